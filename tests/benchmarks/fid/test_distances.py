"""The distance between two sets of pictures is the textbook's, and zero only for equal sets."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from benchmarks.fid.distances import Features, ShapesFeatures, distances, load_classifier
from benchmarks.fid.perceptual import ShapesDistance
from benchmarks.pictures.differences import differences
from benchmarks.pictures.reference import (
    BrokenPictureError,
    Drawn,
    Pictures,
    drawn,
    from_folder,
    pick,
)
from benchmarks.training import architectures
from tomesd.shapes.world import draw, scene

CPU = torch.device("cpu")
SIZE = (32, 32)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Features:
    """The embedded classifier's architecture with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    architectures.build_classifier().half().save_pretrained(folder)
    return Features("shapes", folder)


@pytest.fixture(scope="module")
def measure(features, tmp_path_factory):
    """Distances to the same 80 pictures: more than features, so that the covariance is regular."""
    cache = tmp_path_factory.mktemp("cache")
    reference = Drawn(range(80), SIZE)
    return lambda pictures: distances(pictures, reference, features, cache, "drawn", CPU)


class Darker(Drawn):
    """The same pictures, darker."""

    def __init__(self, indices, size, amount: int) -> None:
        super().__init__(indices, size)
        self.amount = amount

    def __getitem__(self, index: int):
        return (super().__getitem__(index).int() - self.amount).clamp(min=0).to(torch.uint8)


def test_the_distance_of_a_set_to_itself_is_zero(measure):
    found = measure(Drawn(range(80), SIZE))
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == 1


def test_the_distance_grows_with_the_shift(measure):
    shifted = [measure(Darker(range(80), SIZE, amount)) for amount in (0, 20, 60)]
    for name in ("frechet", "kid"):
        assert shifted[0][name] < shifted[1][name] < shifted[2][name]


def test_the_distance_is_the_formula_of_its_authors(measure, features):
    extractor = ShapesFeatures("test", [ShapesFeatures.LAYER], str(features.weights)).eval()
    stacks = [torch.stack([*Drawn(indices, SIZE)]) for indices in (range(80), range(200, 290))]
    with torch.no_grad():
        first, second = (extractor(stack)[0].numpy() for stack in stacks)
    means = first.mean(0) - second.mean(0)
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    direct = means @ means + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    found = measure(Drawn(range(200, 290), SIZE))["frechet"]
    assert found == pytest.approx(direct, rel=1e-6)


def test_the_features_are_the_input_of_the_classifiers_head(features):
    classifier = load_classifier(str(features.weights))
    extractor = ShapesFeatures("test", [ShapesFeatures.LAYER], str(features.weights)).eval()
    pixels = torch.from_numpy(np.array(draw(scene(0)))).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = classifier(pixels.float() / 127.5 - 1)[0]
        judged = classifier.classifier(extractor(pixels)[0].float())
    assert judged.shape == (1, 28)
    assert torch.allclose(logits, judged, atol=1e-6)


def test_only_the_distance_on_inception_features_is_called_fid():
    assert Features("inception").distance == "FID"
    assert Features("shapes").distance == "Fréchet distance on Shapes features"


def test_the_reference_is_drawn_from_scenes_that_no_prompt_asks_for():
    from benchmarks.pictures.prompts import held_out

    asked = set(held_out(1000))
    assert not asked & {scene(index) for index in drawn(1000).of_size(SIZE).indices}


def folder_of_classes(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 30), (index, 0, 0)).save(root / name / f"{index}.png")
    return root


def picked(folder: Path, count: int) -> list[Path]:
    return from_folder(folder, count).of_size(SIZE).paths


def test_a_pick_has_equally_many_of_each_class_and_is_deterministic(tmp_path):
    folder = folder_of_classes(tmp_path / "all", {"cat": 5, "dog": 9, "owl": 7})
    chosen = picked(folder, 12)
    names = [path.parent.name for path in chosen]
    assert {name: names.count(name) for name in names} == {"cat": 4, "dog": 4, "owl": 4}
    assert picked(folder, 12) == chosen
    names = [path.parent.name for path in picked(folder, 10)]
    assert sorted(map(names.count, ("cat", "dog", "owl"))) == [3, 3, 4]


def test_a_class_with_too_few_pictures_is_an_error_that_names_it(tmp_path):
    folder = folder_of_classes(tmp_path / "all", {"cat": 2, "dog": 9})
    with pytest.raises(ValueError, match="4 pictures of each class for 8 in all, got 2 in cat"):
        from_folder(folder, 8)


def test_another_reference_has_another_name(tmp_path):
    folder = folder_of_classes(tmp_path / "all", {"cat": 5})
    names = {from_folder(folder, None).name, from_folder(folder, 4).name}
    Image.new("RGB", (9, 9)).save(folder / "cat" / "0.png")
    names.add(from_folder(folder, None).name)
    assert len(names) == 3
    assert pick({"cat": [Path("a"), Path("b")]}, None) == [Path("a"), Path("b")]


def test_reference_pictures_are_scaled_and_cropped_to_one_size(tmp_path):
    picture = Image.new("RGB", (200, 100), "red")
    picture.paste("blue", (0, 0, 30, 100))
    picture.save(tmp_path / "wide.png")
    pixels = Pictures([tmp_path / "wide.png"], SIZE)[0]
    assert pixels.shape == (3, 32, 32)
    # The blue margin lies outside of the middle square.
    assert pixels[0].min() > 200


def test_a_broken_picture_is_an_error_and_never_a_number(tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise(SIZE, 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BrokenPictureError, match=r"cut\.png is broken"):
        Pictures([path], SIZE)[0]
    with pytest.raises(BrokenPictureError, match=r"cut\.png is broken"):
        differences([path], [path], None, CPU)


def test_differences_are_zero_for_equal_pictures_and_grow(features, tmp_path):
    distance = ShapesDistance(load_classifier(str(features.weights)))
    plain = draw(scene(3), 64)
    paths = {}
    for name, amount in (("none", 0), ("little", 8), ("much", 64)):
        noise = np.random.default_rng(0).integers(-amount, amount + 1, (64, 64, 3))
        pixels = (np.asarray(plain) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path := tmp_path / f"{name}.png")
        paths[name] = [path]
    none, little, much = (differences(paths[n], paths["none"], distance, CPU) for n in paths)
    assert none == {"psnr": None, "ssim": 1, "perceptual": pytest.approx(0, abs=1e-9), "equal": 1}
    assert little["psnr"] > much["psnr"]
    assert 1 > little["ssim"] > much["ssim"]
    assert 0 < little["perceptual"] < much["perceptual"]
    assert little["equal"] == 0


def test_a_picture_that_did_not_change_does_not_make_the_mean_infinite(tmp_path):
    Image.new("RGB", SIZE, "red").save(first := tmp_path / "a.png")
    Image.new("RGB", SIZE, "blue").save(second := tmp_path / "b.png")
    found = differences([first, first], [first, second], None, CPU)
    alone = differences([first], [second], None, CPU)
    assert found["psnr"] == alone["psnr"]
    assert found["equal"] == 1


@pytest.mark.parametrize("content", [b"", b"weights"])
def test_a_wrong_weights_file_is_an_error_that_names_the_right_one(tmp_path, content):
    (path := tmp_path / "inception.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"torch-fidelity's InceptionV3, got .*inception\.pth"):
        Features("inception", path).check()


def test_weights_of_another_network_are_an_error(tmp_path):
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path := tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"got .*resnet\.pth with other tensors"):
        Features("inception", path).check()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pth"):
        Features("inception", tmp_path / "none.pth").check()


def test_too_few_pictures_are_an_error(features, tmp_path):
    few = Drawn(range(3), SIZE)
    with pytest.raises(ValueError, match="there must be 4 pictures or more in both sets, got 3"):
        distances(few, Drawn(range(8), SIZE), features, tmp_path, "drawn", CPU)
