import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lingbot_nb.model.dit import DiT, sinusoid
from lingbot_nb.model.kv_cache import KVCache
from lingbot_nb.model.masks import block_causal, full
from lingbot_nb.presets import LINGBOT, LINGBOT_ACT, MICRO, ModelSize, StreamSettings, VideoShape

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-4
STREAMS = [("cam", -1, 0), ("act", -1, 0), ("window", -1, 0), ("window", 6, 0), ("window", 9, 3)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


class Reference:
    """One reference file: its model with the recorded weights, and its inputs with a batch axis."""

    def __init__(self, name, dtype=torch.float32):
        self.name = name
        path = FIXTURES / f"lingbot_{name}_tiny.safetensors"
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            self.meta = json.loads(file.metadata()["meta"])
        config = self.meta["config"]
        self.size = ModelSize(
            dim=config["dim"],
            heads=config["num_heads"],
            layers=config["num_layers"],
            ffn_dim=config["ffn_dim"],
            text_dim=config["text_dim"],
            text_len=config["text_len"],
            control_channels={"cam": 6, "act": 7}[config["control_type"]],
            freq_dim=config["freq_dim"],
        )
        self.dit = DiT(self.size, dtype=dtype).requires_grad_(False)
        self.dit.load_state_dict({k[8:]: v for k, v in self.tensors.items() if k.startswith("weights/")})
        self.x, self.y, self.control, self.context = (self.tensors[k][None] for k in ("x", "y", "control", "context"))
        self.frames = self.meta["frames"]
        self.shape = VideoShape(self.meta["latent_h"] * 8, self.meta["latent_w"] * 8, 4 * self.frames - 3)

    def to(self, device):
        """The same with model and inputs on a device; what is expected stays where it is."""
        self.dit.to(device)
        self.x, self.y, self.control, self.context = (
            x.to(device) for x in (self.x, self.y, self.control, self.context)
        )
        return self

    def inputs(self, batch=1):
        """Keyword arguments of a whole-clip forward."""
        return {
            "condition_BCFHW": self.y.expand(batch, -1, -1, -1, -1),
            "text": self.dit.text(self.context),
            "camera": self.dit.camera_tokens(self.control),
        }


def deviation(got, expected):
    """Largest difference over the largest value; `pytest -rP` shows what was found."""
    found = ((got.float() - expected).abs().max() / expected.abs().max()).item()
    print(f"off by {found:.1e}")
    return found


@pytest.fixture(scope="module", params=["cam", "act", "window"])
def reference(request):
    return Reference(request.param)


@pytest.mark.parametrize("t", [999.0, 500.0, 37.5])
def test_bidirectional(reference, t):
    out = reference.dit(reference.x, torch.tensor(t), **reference.inputs())
    assert out.dtype == torch.float32
    assert deviation(out[0], reference.tensors[f"bidirectional/t{t}"]) < TOLERANCE


def test_no_control(reference):
    out = reference.dit(reference.x, torch.tensor(500.0), **{**reference.inputs(), "camera": None})
    assert deviation(out[0], reference.tensors["bidirectional/no_control_t500.0"]) < TOLERANCE


def test_one_timestep_per_frame(reference):
    t = reference.tensors["per_frame_timesteps"][None]
    out = reference.dit(reference.x, t, **reference.inputs())
    assert deviation(out[0], reference.tensors["bidirectional/per_frame"]) < TOLERANCE
    assert torch.equal(reference.dit(reference.x, reference.dit.time(t), **reference.inputs()), out)


def test_batch_with_a_timestep_each(reference):
    levels = [999.0, 500.0, 37.5]
    batch = reference.x.repeat(3, 1, 1, 1, 1)
    out = reference.dit(batch, torch.tensor(levels), **reference.inputs(batch=3))
    for row, t in zip(out, levels, strict=True):
        assert deviation(row, reference.tensors[f"bidirectional/t{t}"]) < TOLERANCE


def test_lazy_and_ready_made_inputs_agree(reference):
    kwargs = reference.inputs()
    expected = reference.dit(reference.x, torch.tensor(500.0), **kwargs)
    kwargs["camera"] = reference.dit.film(reference.control)
    kwargs["text"] = reference.dit.text_tokens([reference.context[0]])
    assert deviation(reference.dit(reference.x, torch.tensor([500.0]), **kwargs), expected) < 1e-6
    kwargs["mask"] = full(reference.frames)
    assert deviation(reference.dit(reference.x, torch.tensor(500.0), **kwargs), expected) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name,window,sink", STREAMS)
def test_streamed_with_cache(name, window, sink, device):
    ref = Reference(name).to(device)
    chunk, folder = ref.meta["chunk"], f"stream/local{window}_sink{sink}"
    settings = StreamSettings(chunk, None if window < 0 else window, sink, relative=False, image_first=False)
    cache, text = KVCache(ref.size, settings, ref.shape, device=device), ref.dit.text(ref.context)
    for number in range(ref.frames // chunk):
        span = slice(number * chunk, (number + 1) * chunk)
        x = ref.x[:, :, span]
        kwargs = {
            "condition_BCFHW": ref.y[:, :, span],
            "text": text,
            "camera": ref.dit.film(ref.control[:, :, span]),
            "cache": cache,
        }
        for t in (999.0, 500.0):
            out = ref.dit(x, torch.tensor(t), **kwargs)
            assert deviation(out[0].cpu(), ref.tensors[f"{folder}/chunk{number}/t{t}"]) < TOLERANCE
        ref.dit(0.5 * x, torch.tensor(0.0), **kwargs)
        cache.commit()
    last = ref.size.layers - 1
    assert deviation(cache.ordered(0)[0][0].cpu(), ref.tensors[f"{folder}/layer0_k"]) < TOLERANCE
    assert deviation(cache.ordered(last)[1][0].cpu(), ref.tensors[f"{folder}/layer{last}_v"]) < TOLERANCE


@pytest.mark.parametrize("preset,parameters", [(LINGBOT, 18_544_332_864), (LINGBOT_ACT, 18_545_643_584)])
def test_names_and_counts_of_the_released_model(preset, parameters):
    state = DiT(preset.model, device="meta").state_dict()
    assert len(state) == 1421 and sum(x.numel() for x in state.values()) == parameters
    small = {k[8:] for k in load_file(FIXTURES / "lingbot_cam_tiny.safetensors") if k.startswith("weights/")}
    layers = {name.replace("blocks.1.", "blocks.39.") for name in small}
    assert layers < set(state) and state["head.head.weight"].shape == (64, 5120)


def test_without_control_it_is_plain_wan():
    size = ModelSize(**{**MICRO.model.__dict__, "control_channels": 0, "layers": 40})
    names = DiT(size, device="meta").state_dict()
    assert len(names) == 1095 and not any("cam" in name or "c2ws" in name for name in names)


def test_released_parameters_survive_strict_loading_under_every_size(reference):
    own = {k: tuple(v.shape) for k, v in DiT(reference.size, device="meta").state_dict().items()}
    assert own == {k[8:]: tuple(v.shape) for k, v in reference.tensors.items() if k.startswith("weights/")}


def test_time_sinusoid_is_cosines_then_sines():
    out = sinusoid(torch.tensor([250.0]), 8)[0]
    angles = 250.0 * 10_000.0 ** (-torch.arange(4).double() / 4)
    torch.testing.assert_close(out, torch.cat([angles.cos(), angles.sin()]).float())


def test_fresh_weights():
    torch.manual_seed(0)
    dit = DiT(MICRO.model)
    assert not dit.head.head.weight.any() and not any(
        p.any() for n, p in dit.named_parameters() if n.endswith(".bias") and "norm3" not in n
    )
    for linear in (dit.text_embedding[0], dit.time_embedding[2]):
        assert abs(linear.weight.std().item() - 0.02) < 0.003
    weight = dit.blocks[0].cam_scale_layer.weight
    assert abs(weight.std().item() - (2 / sum(weight.shape)) ** 0.5) < 0.01 and weight.any()
    assert abs(dit.blocks[1].modulation.std().item() - MICRO.model.dim**-0.5) < 0.03
    x, y = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 20, 2, 4, 6)
    out = dit(x, torch.tensor(500.0), condition_BCFHW=y, text=dit.text(torch.randn(1, 3, 64)))
    assert out.shape == x.shape and not out.any()


def test_bf16_keeps_the_precise_parts_precise(reference):
    half = Reference(reference.name, torch.bfloat16)
    exact = Reference(reference.name)
    streams = []
    half.dit.blocks[0].register_forward_hook(lambda module, args, out: streams.append(out))
    assert half.dit.text(half.context).layers[0][0].dtype == torch.bfloat16
    assert half.dit.film(half.control)[0][0].dtype == torch.bfloat16
    for t in (999.0, 500.0):
        time = half.dit.time(torch.tensor(t))
        assert time.head.dtype == time.layers.dtype == torch.float32
        out = half.dit(half.x, torch.tensor(t), **half.inputs())
        assert out.dtype == streams[-1].dtype == torch.float32
        # About three decimal digits in, three out: measured 0.0033 to 0.0044 of the largest velocity.
        assert deviation(out[0], exact.tensors[f"bidirectional/t{t}"]) < 0.01
    with torch.autocast("cpu", torch.bfloat16):
        out = exact.dit(exact.x, torch.tensor(500.0), **exact.inputs())
    assert out.dtype == torch.float32
    assert deviation(out[0], exact.tensors["bidirectional/t500.0"]) < 0.01


@pytest.mark.parametrize("checkpoint", [False, True])
def test_trains_under_autocast(checkpoint):
    torch.manual_seed(0)
    dit = DiT(MICRO.model)
    torch.nn.init.normal_(dit.head.head.weight, std=0.3)
    latent, condition, control = (torch.randn(2, c, 3, 4, 6) for c in (16, 20, 640))
    with torch.autocast("cpu", torch.bfloat16):
        out = dit(
            latent.half(),
            torch.rand(2, 3) * 1000,
            condition_BCFHW=condition,
            text=dit.text(torch.randn(2, 3, 64)),
            camera=dit.camera_tokens(control),
            mask=block_causal([1, 1, 1]),
            checkpoint=checkpoint,
        )
        loss = out.square().mean()
    loss.backward()
    for name, parameter in dit.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    dit = DiT(MICRO.model)
    torch.nn.init.normal_(dit.head.head.weight, std=0.3)
    latent, condition, control = (torch.randn(1, c, 3, 4, 6) for c in (16, 20, 640))
    gradients = []
    for checkpoint in (False, True):
        kwargs = {
            "text": dit.text(torch.ones(1, 3, 64)),
            "camera": dit.camera_tokens(control),
            "checkpoint": checkpoint,
        }
        loss = dit(latent, torch.tensor([300.0]), condition_BCFHW=condition, **kwargs).square().mean()
        gradients.append(torch.autograd.grad(loss, list(dit.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_clear_errors():
    dit = DiT(MICRO.model).requires_grad_(False)
    text = dit.text(torch.randn(1, 3, 64))
    x, y = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 20, 2, 4, 6)
    t = torch.tensor(1.0)
    with pytest.raises(ValueError, match="32 channels together, this model takes 36"):
        dit(x, t, condition_BCFHW=x, text=text)
    with pytest.raises(ValueError, match="mask 'full' is for"):
        dit(x, t, condition_BCFHW=y, text=text, mask=full(3))
    with pytest.raises(ValueError, match="3 positions for 2 frames"):
        dit(x, t, condition_BCFHW=y, text=text, positions=[0, 1, 2])
    with pytest.raises(ValueError, match="does not divide into 2x2 patches"):
        dit(x[..., :5], t, condition_BCFHW=y[..., :5], text=text)
    with pytest.raises(ValueError, match="at most 16 rows of 64"):
        dit.text(torch.randn(1, 17, 64))
    with pytest.raises(ValueError, match="control has 384 channels, this model takes 640"):
        dit.camera_tokens(torch.randn(1, 384, 2, 4, 6))
    with pytest.raises(ValueError, match="one per frame"):
        dit(x, torch.zeros(1, 2, 3), condition_BCFHW=y, text=text)
    # Four or six values would divide the tokens as well, and mean something else.
    for wrong in (torch.zeros(2), torch.zeros(1, 4), torch.zeros(1, 6), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match="for a batch of 1 and 2 frames: give one, one per clip"):
            dit(x, wrong, condition_BCFHW=y, text=text)


@needs_gpu
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, TOLERANCE), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(reference, dtype, tolerance, compiled):
    ref = Reference(reference.name, dtype).to("cuda")
    dit = ref.dit
    if compiled:
        for layer in dit.blocks:
            layer.compile()
    out = dit(ref.x, torch.tensor(500.0), **ref.inputs()).cpu()
    assert deviation(out[0], ref.tensors["bidirectional/t500.0"]) < tolerance
    mask = block_causal([1] * ref.frames, 3, 1)
    on_cpu = Reference(reference.name)
    expected = on_cpu.dit(on_cpu.x, torch.tensor(500.0), **on_cpu.inputs(), mask=mask)
    assert deviation(dit(ref.x, torch.tensor(500.0), **ref.inputs(), mask=mask).cpu(), expected) < tolerance
