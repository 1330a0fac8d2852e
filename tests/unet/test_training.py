"""Gradients of a patched UNet are right, also where blocks are computed a second time."""

import gc
import weakref

import pytest
import torch

import tomesd
from tests.support.tiny_unets import controlnet, sd_unet, unet_inputs

EVERYTHING = {"merge_crossattn": True, "merge_mlp": True, "max_downsample": 8}
SETTINGS = [
    {},
    {"merge_attn": True},
    {"prop_attn": False},
    {"merge_queries": False},
    {"use_rand": True},
    {"method": "prune"},
    EVERYTHING | {"use_rand": True},
]


def _gradients(unet, *calls: dict) -> list[torch.Tensor]:
    """Of the sum of several forward passes: by every weight, and by the inputs."""
    inputs = [unet_inputs(unet, h=call["h"], w=call["w"]) for call in calls]
    for each, call in zip(inputs, calls, strict=True):
        each["timestep"] = torch.tensor(call["timestep"])
        each["sample"].requires_grad_()
    unet.zero_grad()
    sum(unet(**each).sample.square().mean() for each in inputs).backward()
    weights = [parameter.grad for parameter in unet.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in weights)
    return [*weights, *(each["sample"].grad for each in inputs)]


ONE_STEP = ({"h": 10, "w": 14, "timestep": 500},)
# Two sizes with as many tokens, and two timesteps, before one backward pass.
TWO_STEPS = ({"h": 10, "w": 14, "timestep": 900}, {"h": 14, "w": 10, "timestep": 100})


# Two passes are what a single one is and more; it is for finding out what is wrong.
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("settings", "calls"),
    [({}, ONE_STEP), *((settings, TWO_STEPS) for settings in SETTINGS)],
    ids=lambda value: str(value) if isinstance(value, dict) else f"passes: {len(value)}",
)
def test_gradients_are_the_same_with_and_without_checkpointing(settings, calls, reentrant):
    unet = tomesd.apply_patch(sd_unet().train(), **settings)
    expected = _gradients(unet, *calls)
    if reentrant:
        checkpoint = torch.utils.checkpoint.checkpoint
        unet.enable_gradient_checkpointing(
            lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=True)
        )
    else:
        unet.enable_gradient_checkpointing()
    for got, want in zip(_gradients(unet, *calls), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_checkpointing_really_computes_the_blocks_again():
    unet = tomesd.apply_patch(sd_unet().train(), **EVERYTHING)
    calls = []
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.norm1.register_forward_hook(lambda *_: calls.append(1))
    _gradients(unet, *ONE_STEP)
    once = len(calls)
    unet.enable_gradient_checkpointing()
    _gradients(unet, *ONE_STEP)
    assert len(calls) == once + 2 * once


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=str)
def test_gradients_are_those_of_finite_differences(settings):
    unet = tomesd.apply_patch(sd_unet().double(), **settings)
    inputs = unet_inputs(unet, batch=1, h=4, w=6)
    text = inputs.pop("encoder_hidden_states").requires_grad_()
    direction = torch.randn(text.shape, generator=torch.Generator().manual_seed(0)).double()

    def loss(step):
        return unet(encoder_hidden_states=text + step * direction, **inputs).sample.square().mean()

    # The text changes later blocks' features only a little: no other tokens merge.
    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    (gradient,) = torch.autograd.grad(loss(0), text)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-9)


def _watch(unet) -> list[weakref.ref]:
    """Everything that enters a feed-forward layer, as long as somebody keeps it."""
    seen: list[weakref.ref] = []
    for module in unet.modules():
        if type(module).__name__ == "FeedForward":
            module.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    return seen


def test_nothing_of_a_checkpointed_pass_is_kept_after_backward():
    unet = tomesd.apply_patch(sd_unet().train(), max_downsample=8)
    unet.enable_gradient_checkpointing()
    seen = _watch(unet)
    runs = [found.threads for found in unet._tomesd_patch.transformers]
    _gradients(unet, *ONE_STEP)
    gc.collect()
    assert seen
    assert not [each for each in seen if each() is not None]
    assert not [each for each in runs if each.state.x is not None]


def test_nothing_of_a_pass_that_failed_is_kept():
    unet = tomesd.apply_patch(sd_unet())
    seen = _watch(unet)

    def fail(module, args):
        raise RuntimeError("out of memory")

    broken = unet.down_blocks[0].attentions[0].transformer_blocks[0].ff.net[2]
    handle = broken.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        unet(**unet_inputs(unet))
    assert len(seen) == 1
    assert unet._tomesd_patch.transformers[0].threads.state.x is None
    handle.remove()
    assert unet(**unet_inputs(unet)).sample.isfinite().all()


def test_checkpointing_may_be_switched_on_before_or_after_patching():
    before, after = sd_unet().train(), sd_unet().train()
    before.enable_gradient_checkpointing()
    tomesd.apply_patch(before, **EVERYTHING)
    tomesd.apply_patch(after, **EVERYTHING)
    after.enable_gradient_checkpointing()
    pairs = zip(_gradients(before, *ONE_STEP), _gradients(after, *ONE_STEP), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_training_steps_with_a_patch_learn():
    unet = tomesd.apply_patch(sd_unet().train(), **EVERYTHING)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.05)
    inputs, losses = unet_inputs(unet), []
    for _ in range(5):
        loss = unet(**inputs).sample.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_a_controlnet_trains_while_both_are_patched():
    unet = sd_unet()
    net = controlnet(unet).train()
    for model in (unet, net):
        tomesd.apply_patch(model)
        model.enable_gradient_checkpointing()
    inputs = unet_inputs(unet, h=8, w=8)
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    down, middle = net(**inputs, controlnet_cond=picture, return_dict=False)
    unet(
        **inputs,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
