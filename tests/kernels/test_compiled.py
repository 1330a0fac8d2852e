"""Every kernel compiles for GPUs that are not there, without spills and within shared memory."""

import pytest

from tests.support.slow import slow

pytest.importorskip("triton")

from benchmarks.gpu.compiled import ARCHITECTURES, DTYPES, SHARED, compile_for, variants

MATCHES = {"match"}
# Those that differ by dtype in more than how tokens are loaded; of the others a sample.
SAMPLE = {"fp16": None, "fp32": None, "bf16": {"match", "merge backward, direction"}}


@pytest.fixture(autouse=True)
def _new_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(variant, dtype, architecture):
    row = compile_for(variant, dtype, architecture)
    assert row["stack"] == 0, f"registers are spilled: {row}"
    assert row["registers"] <= 255
    assert row["shared"] <= SHARED[architecture] * 1024
    # Two blocks of threads at a time at least.
    assert 2 * row["registers"] * 32 * variant.warps <= 65536


def cases(dtypes, names=None):
    return [
        pytest.param(variant, dtype, id=f"{variant.name}, {dtype}")
        for dtype in dtypes
        for variant in variants(dtype, 320)
        if (names is None or variant.name in names)
        and (SAMPLE[dtype] is None or variant.name in SAMPLE[dtype])
    ]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    cases(["fp16"], {"match", "cut", "merge, mean", "unmerge with the residual"}),
)
def test_the_kernels_of_a_block_compile_for_an_rtx_40(variant, dtype):
    check(variant, dtype, 89)


@slow
@pytest.mark.parametrize("architecture", [80, 86, 89, 90])
@pytest.mark.parametrize(("variant", "dtype"), cases(DTYPES))
def test_every_kernel_compiles(variant, dtype, architecture):
    check(variant, dtype, architecture)


@slow
@pytest.mark.parametrize("architecture", [each for each in ARCHITECTURES if each > 90])
@pytest.mark.parametrize(("variant", "dtype"), cases(["fp16", "fp32"], MATCHES))
def test_matching_compiles_for_newer_gpus(variant, dtype, architecture):
    check(variant, dtype, architecture)


@slow
@pytest.mark.parametrize("channels", [64, 3072])
def test_few_and_many_channels_compile(channels):
    for variant in variants("fp16", channels):
        if variant.name in ("merge, direction", "unmerge with the residual"):
            check(variant, "fp16", 86)
