"""Trainings on cards that are too small: what gives way, and what is said when nothing can."""

import contextlib
import gc
import types
import weakref

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_agent.lora import plan, session, tiny_base
from gpu_agent.lora.compiled import compile_blocks
from gpu_agent.lora.errors import TrainingError
from gpu_agent.lora.job import Job
from gpu_agent.lora.offload import Swap
from gpu_agent.lora.quantise import quantise
from gpu_agent.lora.talk import Orders
from gpu_agent.needs import Way

GIB = 2**30


class Card(TorchDispatchMode):
    """A GPU's memory, played on the CPU: what is allocated counts, and too much is refused.

    Plenty while the model is loaded, then `room` GiB.
    """

    def __init__(self, room=1000.0):
        super().__init__()
        self.limit, self.now, self.most = 1000 * GIB, 0, 0
        self.later = room * GIB
        self.sizes = {}

    def room(self):
        return self.limit / GIB

    def watch(self):
        gc.collect()
        self.most, self.limit = self.now, self.later
        return contextlib.nullcontext()

    def peak(self):
        return self.most / GIB

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage):
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        if self.now > self.limit:
            raise torch.OutOfMemoryError("the card is full")

    def _forget(self, key):
        self.now -= self.sizes.pop(key)


class Heard(list):
    def __init__(self, react):
        super().__init__()
        self.react = react

    def emit(self, event, **fields):
        self.append({"event": event, **fields})
        if event in self.react:
            self.react[event]()

    def one(self, event):
        (heard,) = (heard for heard in self if heard["event"] == event)
        return heard

    @property
    def losses(self):
        return [heard["loss"] for heard in self if heard["event"] == "validation"]


@pytest.fixture(scope="module")
def train_on(workshop_in, tmp_path_factory):
    """Train a small FLUX.1 on a card; what was heard."""
    folder = tmp_path_factory.mktemp("fit")
    workshop = workshop_in(folder)
    base = tiny_base.write(folder / "base", 0, "flux")

    def run(card, react=None, **recipe):
        said = {"steps": 3, "validation_every": 3, "batch_size": 4, **recipe}
        name = f"job-{len(list(folder.iterdir()))}"
        job = Job.from_dict(workshop.job(name, base=base, family="flux", **said))
        heard = Heard(react or {})
        with card:
            session.train(plan.make(job), heard, Orders(), meter=card)
        return heard

    return run


@pytest.fixture(scope="module")
def usual(train_on):
    """What was heard of a training with memory to spare."""
    return train_on(Card())


def test_with_memory_to_spare_nothing_gives_way(usual):
    fit = usual.one("started")["fit"]
    assert (fit["images"], fit["gradient_checkpointing"]) == (4, False)
    assert (fit["base_precision"], fit["block_swap"]) == ("same", 0)
    assert 0 < fit["measured"] < fit["room"]


def test_on_a_small_card_the_same_is_learned_in_smaller_passes(usual, train_on):
    wanted = usual.one("started")["fit"]["measured"]
    heard = train_on(Card(0.8 * wanted), base_precision="same")
    fit = heard.one("started")["fit"]
    assert fit["images"] < 4 or fit["gradient_checkpointing"]
    assert fit["measured"] <= fit["room"] < wanted
    assert heard.losses == pytest.approx(usual.losses, rel=1e-4)


def test_memory_that_is_lost_on_the_way_costs_no_step(usual, train_on):
    card, wanted = Card(), usual.one("started")["fit"]["measured"]

    def shrink():
        card.limit = 0.8 * wanted * GIB

    heard = train_on(card, {"started": shrink}, base_precision="same")
    assert heard.one("started")["fit"]["images"] == 4
    assert heard.one("completed")["steps"] == 3
    assert heard.losses == pytest.approx(usual.losses, rel=1e-4)


def test_a_training_that_fits_nowhere_says_what_would_do(usual, train_on):
    wanted = usual.one("started")["fit"]["measured"]
    whole = {"base_precision": "same", "gradient_checkpointing": "off", "batch_size": 1}

    def shrink():
        card.limit = 0.3 * wanted * GIB

    card = Card()
    with pytest.raises(TrainingError, match=r"a GPU of \d+ GiB would do") as raised:
        train_on(card, {"started": shrink}, **whole)
    assert (raised.value.code, raised.value.retryable) == ("trainer.oom", True)


def test_what_a_recipe_orders_is_done_without_a_card_too(workshop):
    ordered = {"base_precision": "int8", "block_swap": 4, "gradient_checkpointing": "on"}
    said = {"steps": 2, "validation_every": 2, "batch_size": 1, "compile": "off", **ordered}
    heard, done = workshop.train(workshop.job(**said))
    fit = heard.one("started")["fit"]
    assert {key: fit[key] for key in ordered} == {**ordered, "gradient_checkpointing": True}
    assert done
    assert heard.one("completed")["loss_best"] == pytest.approx(
        heard.one("completed")["loss_first"], rel=0.05
    )


# --- weights that take less -----------------------------------------------------------------------


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12),
        )
        made.requires_grad_(False).eval()
        made.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return made, [*made.transformer_blocks, *made.single_transformer_blocks]


def told():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return {
            "hidden_states": torch.randn(2, 16, 16),
            "encoder_hidden_states": torch.randn(2, 8, 64),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.rand(2),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(8, 3),
        }


def learned(made):
    """Output, and the gradients of what is trained."""
    said = made(**told()).sample
    said.square().mean().backward()
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    gradients = [parameter.grad.clone() for parameter in trained]
    made.zero_grad()
    return [said.detach(), *gradients]


@pytest.mark.parametrize("again", [False, True])
def test_blocks_that_wait_on_the_host_compute_the_same_to_the_bit(again):
    made, blocks = network()
    if again:
        made.enable_gradient_checkpointing()
    plain = learned(made)
    quantise(blocks, "same")
    swap = Swap(blocks[1:], torch.device("cpu"))
    seen = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(swap.resident))
    for _ in range(2):  # from the end of a backward pass to the beginning of the next
        assert all(map(torch.equal, plain, learned(made)))
    assert max([*seen, swap.resident]) == 2 < len(blocks)


@pytest.mark.parametrize(
    ("base", "off", "share"), [("int8", 0.002, 0.27), ("nf4", 0.03, 0.17)], ids=["int8", "nf4"]
)
def test_rounded_weights_take_less_and_still_teach(base, off, share):
    made, blocks = network()
    plain, before = learned(made)[0], weight_of(blocks)
    quantise(blocks, base)
    assert weight_of(blocks) < share * before
    assert (learned(made)[0] - plain).norm() < off * plain.norm()
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(15):
        losses.append(made(**told()).sample.sub(1).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def weight_of(blocks):
    """Bytes of what is frozen."""
    tensors = [item for block in blocks for item in (*block.parameters(), *block.buffers())]
    return sum(item.numel() * item.element_size() for item in tensors if not item.requires_grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of its own
def test_a_block_that_cannot_be_compiled_goes_on_as_it_was(monkeypatch, tmp_path, caplog):
    import torch._inductor.config as inductor

    made, blocks = network()
    plain = learned(made)
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert compile_blocks(types.SimpleNamespace(blocks=lambda: blocks[:1]), tmp_path, Way())
    assert all(map(torch.equal, plain, learned(made)))
    assert "not compiled" in caplog.text
