"""How to train: the recipe, its one dial, and what each family of base models wants otherwise.

Standard library only, for both sides read it: the server checks what a customer ordered and works
out the rest, the trainer does what the result says. A key that nobody said gets the value of the
dial (`quality`), then of the family, then the plain one below; `to_dict` has them all, is printed
once and stored with the job, and reads back as the same recipe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train a LoRA: one meaning for each field; an unknown key is an error.

    Attributes:
        quality: the dial: `draft`, `standard` or `fine`; sets what is not said.
        steps: optimizer steps.
        resolution: side in pixels of the square whose area each bucket keeps; a multiple of 64.
        batch_size: images per forward pass.
        gradient_accumulation: forward passes per optimizer step.
        adapter: `lora`; `dora` (arXiv:2402.09353), `lokr` (arXiv:2309.14859), `oft`
            (arXiv:2306.07280); or `embedding`, textual inversion of `trigger` (arXiv:2208.01618).
        rank, alpha: of the adapter; its update is scaled by alpha / rank. Alpha is the rank where
            it is not said. For `oft` the rank is the block size, for `embedding` the number of
            vectors, and alpha is nothing.
        targets: `attention` (to_q, to_k, to_v, to_out.0) or `full` (the set of sd-scripts).
        text_encoder_rate: learning rate of the text encoders' own LoRA (of Anima, that of its text
            conditioner); 0 leaves them alone.
        lora_plus: learning rate of B as a multiple of A's (LoRA+, arXiv:2402.12354).
        learning_rate: of the adapter's weights; 1 for `prodigy`, which finds the rate itself.
        optimizer: `adamw8bit` and `adafactor` save memory; `prodigy` and `schedule_free` need
            less tuning.
        weight_decay: decoupled from the gradient, as AdamW has it.
        max_grad_norm: longer gradients are cut to this length.
        scheduler: of the learning rate over the steps; `schedule_free` wants `constant`.
        warmup_steps: over so many steps the learning rate rises from 0.
        ema_decay: of the exponential moving average of the weights that is validated and kept
            instead of them; 0 means none.
        trigger: the word that stands for the subject.
        caption_template: used for images without a caption file; `{trigger}` is replaced.
        caption_dropout: share of steps trained with an empty caption.
        caption_shuffle: exchange a caption's comma-separated parts at random.
        keep_tokens: so many of the first parts stay where they are.
        flip: mirror images at random.
        masked_loss: weigh the loss by each image's mask, `NAME.mask.png` or its alpha channel.
        prior_prompt: what class images show (prior preservation, arXiv:2208.12242); they come
            from the dataset's folder `regularization`, or else are painted before training.
        prior_images: how many are painted where the dataset has none.
        prior_weight: of their loss beside that of the photographs.
        min_snr_gamma: Min-SNR loss weighting (arXiv:2303.09556); 5 is usual.
        debiased: debiased estimation loss (arXiv:2310.08442).
        noise_offset: (crosslabs.org, "Diffusion with Offset Noise"); 0.05 to 0.1 is usual.
        prediction: what a Stable Diffusion denoiser predicts; `auto` is what the model says.
        timestep_sampling: density of the noise levels: `uniform`, `logit_normal`, or
            `flux_shift`, logit-normal with the shift that FLUX.1 has at this resolution.
        timestep_shift: shift s of a level t: s t / (1 + (s - 1) t) (arXiv:2403.03206).
        guidance: what a guidance-distilled denoiser (FLUX.1 dev) is told in training.
        validation_every: steps between validations, each of which may write a checkpoint.
        validation_share: share of images held out; with fewer than 8 images all are used for
            both, and the result says so.
        patience: end after so many validations in a row without a lower loss; 0 means never.
        checkpoint_s: seconds of training between checkpoints beside those: what a lost machine
            costs at most, but for the time of an upload. 0 means none beside those.
        keep_checkpoints: how many of the best (and the last two) stay on disk.
        sample_prompts: what sample images are made of.
        sample_every: steps between them; 0 means only at the end.
        sample_seeds: images per prompt, each from its own noise.
        precision: `auto` takes bf16 where the GPU has it, else fp16, and fp32 on a CPU.
        base_precision: of the frozen weights: `same` as `precision`, `int8`, `nf4`; `auto`
            quantises only when it must to fit.
        gradient_checkpointing: `auto` is on only if it must.
        block_swap: how many of the denoiser's blocks wait on the host; -1 swaps only if it must.
        compile: of the denoiser's blocks; `auto` where it pays.
        cache: of latents and embeddings: in memory (`ram`), on `disk`, or what fits (`auto`).
        seed: of whatever is drawn: on one device the same seed gives the same weights.
    """

    quality: str = "standard"
    steps: int = 1000
    resolution: int = 512
    batch_size: int = 1
    gradient_accumulation: int = 1
    adapter: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    targets: str = "attention"
    text_encoder_rate: float = 0.0
    lora_plus: float = 1.0
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    scheduler: str = "cosine"
    warmup_steps: int = 0
    ema_decay: float = 0.0
    trigger: str = ""
    caption_template: str = "a photo of {trigger}"
    caption_dropout: float = 0.0
    caption_shuffle: bool = False
    keep_tokens: int = 1
    flip: bool = False
    masked_loss: bool = False
    prior_prompt: str = ""
    prior_images: int = 0
    prior_weight: float = 1.0
    min_snr_gamma: float | None = None
    debiased: bool = False
    noise_offset: float = 0.0
    prediction: str = "auto"
    timestep_sampling: str = "uniform"
    timestep_shift: float = 1.0
    guidance: float = 1.0
    validation_every: int = 100
    validation_share: float = 0.1
    patience: int = 0
    checkpoint_s: float = 120.0
    keep_checkpoints: int = 3
    sample_prompts: tuple[str, ...] = ()
    sample_every: int = 0
    sample_seeds: int = 1
    precision: str = "auto"
    base_precision: str = "auto"
    gradient_checkpointing: str = "auto"
    block_swap: int = -1
    compile: str = "auto"
    cache: str = "auto"
    seed: int = 0

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], family: str = "sd1") -> Recipe:
        """Check a customer's recipe for a family, and work out what is not said.

        Raises:
            RecipeError: every fault that was found, each with the key that it is about.
        """
        faults: dict[str, str] = {}
        known = {item.name: item for item in dataclasses.fields(cls)}
        for key in value:
            if key not in known:
                faults[str(key)] = f"is not a recipe key; known are {', '.join(sorted(known))}"
        said: dict[str, Any] = {}
        for key, (accept, wants) in RULES.items():
            if key in value:
                got: Any = tuple(value[key]) if isinstance(value[key], list) else value[key]
                if accept(got):
                    said[key] = float(got) if known[key].type == "float" else got
                else:
                    faults[key] = f"must be {wants}, not {value[key]!r}"
        faults |= _misfits(said, family)
        if faults:
            raise RecipeError(faults)
        return cls(**{**_unsaid(said, family), **said})

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "sample_prompts": list(self.sample_prompts)}


class RecipeError(ValueError):
    """A recipe that cannot be trained; `faults` maps each key to what is wrong with it."""

    def __init__(self, faults: Mapping[str, str]) -> None:
        self.faults = dict(faults)
        super().__init__("; ".join(f"{key} {fault}" for key, fault in self.faults.items()))


# --- what is not said -------------------------------------------------------------------------

#: The dial. `steps` and `rank` are common practice for subjects of 5 to 50 photographs.
QUALITIES: Mapping[str, Mapping[str, Any]] = {
    "draft": {"steps": 300, "rank": 8},
    "standard": {"steps": 1000, "rank": 16},
    "fine": {"steps": 2000, "rank": 32, "targets": "full", "ema_decay": 0.99, "patience": 8},
}
#: Where a family differs. Levels and shifts are those of sd-scripts' documentation for the family;
#: FLUX.1's guidance of 1 and its shift by resolution are what its users settled on.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "sd1": {},
    "sd2": {"resolution": 768},
    "sdxl": {"resolution": 1024},
    "sd3": {"resolution": 1024, "timestep_sampling": "logit_normal"},
    "flux": {"resolution": 1024, "timestep_sampling": "flux_shift"},
    "lumina2": {
        "resolution": 1024,
        "timestep_sampling": "logit_normal",
        "timestep_shift": 6.0,
    },
    "hunyuanimage": {
        "resolution": 2048,
        "timestep_sampling": "logit_normal",
        "timestep_shift": 5.0,
    },
    "anima": {"resolution": 1024, "timestep_sampling": "logit_normal"},
}
#: On the Hugging Face hub, as diffusers folders: what a single file lacks comes from there.
REPOSITORIES: Mapping[str, str] = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
    "hunyuanimage": "hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
    "anima": "circlestone-labs/Anima-Base-v1.0-Diffusers",
}
#: Those that predict the noise of a noise schedule; the others follow a straight flow.
DIFFUSION = frozenset({"sd1", "sd2", "sdxl"})
#: What only they know, and the value that says nothing.
_DIFFUSION_ONLY = {
    "min_snr_gamma": None,
    "debiased": False,
    "noise_offset": 0.0,
    "prediction": "auto",
}
#: Those whose text encoders' LoRA is read by the programs that read the rest of it.
ADAPTABLE_TEXTS = frozenset({"sd1", "sd2", "sdxl", "sd3", "flux", "anima"})
#: Adapters with an A and a B.
_LOW_RANK = frozenset({"lora", "dora"})
#: What `base_precision` may be, of adapters that look at the weights themselves: DoRA divides by
#: their norms, LoKr takes their shape, which 4 bits in a byte have not.
ROUNDED = {"dora": ("same",), "lokr": ("same", "int8")}
_OWN_RATE = frozenset({"prodigy"})


def _unsaid(said: Mapping[str, Any], family: str) -> dict[str, Any]:
    chosen = {**QUALITIES[said.get("quality", "standard")], **FAMILIES[family]}
    if said.get("optimizer") in _OWN_RATE:
        chosen["learning_rate"] = 1.0
    if said.get("optimizer") == "schedule_free":
        # it averages the weights itself, instead of lowering the rate
        chosen |= {"scheduler": "constant", "ema_decay": 0.0}
    if said.get("adapter") == "embedding":
        # a few vectors of a prompt; the rate is that of diffusers' and sd-scripts' examples
        chosen |= {"rank": 4, "learning_rate": 5e-3, "ema_decay": 0.0}
    chosen["alpha"] = float({**chosen, **said}["rank"])
    return chosen


def _misfits(said: Mapping[str, Any], family: str) -> dict[str, str]:
    """Keys that are fine alone, but not with this family or beside each other."""
    faults = {}
    if family not in DIFFUSION:
        for key, silent in _DIFFUSION_ONLY.items():
            if said.get(key, silent) != silent:
                faults[key] = f"is for {', '.join(sorted(DIFFUSION))}, not for {family}"
    if said.get("adapter") == "embedding":
        if family not in DIFFUSION:
            faults["adapter"] = f"embedding is for {', '.join(sorted(DIFFUSION))}, not {family}"
        elif not said.get("trigger", "").strip():
            faults["adapter"] = "embedding needs a trigger: the word that it teaches"
    adapter, base = said.get("adapter", "lora"), said.get("base_precision", "auto")
    if base not in {"auto", *ROUNDED.get(adapter, (base,))}:
        faults["base_precision"] = f"must be {' or '.join(ROUNDED[adapter])} for {adapter}"
    if adapter == "dora" and said.get("block_swap", 0) > 0:
        faults["block_swap"] = "is not for dora"
    faults |= _misfit_rates(said, family)
    if said.get("min_snr_gamma") is not None and said.get("debiased"):
        faults["debiased"] = "and min_snr_gamma weigh the same thing; take one of them"
    if said.get("prior_images", 0) > 0 and not said.get("prior_prompt", "").strip():
        faults["prior_images"] = "needs prior_prompt: what the images of the class show"
    return faults


def _misfit_rates(said: Mapping[str, Any], family: str) -> dict[str, str]:
    """Of optimizers and adapters, and of rates for what is not there."""
    faults = {}
    low_rank = said.get("adapter", "lora") in _LOW_RANK
    if said.get("text_encoder_rate", 0.0) > 0:
        if family not in ADAPTABLE_TEXTS:
            faults["text_encoder_rate"] = (
                f"is for {', '.join(sorted(ADAPTABLE_TEXTS))}, not for {family}"
            )
        elif not low_rank:
            faults["text_encoder_rate"] = f"is for {' and '.join(sorted(_LOW_RANK))} only"
    if said.get("lora_plus", 1.0) != 1 and not low_rank:
        faults["lora_plus"] = f"is for {' and '.join(sorted(_LOW_RANK))} only"
    if said.get("optimizer") == "prodigy":
        text_rate = said.get("text_encoder_rate", 0.0)
        if said.get("lora_plus", 1.0) != 1:
            faults["lora_plus"] = "does not go with prodigy, which has one rate for all"
        if text_rate not in (0, said.get("learning_rate", 1.0)):
            faults["text_encoder_rate"] = "must be learning_rate with prodigy, which has one rate"
    if said.get("adapter") == "dora" and said.get("base_precision") in {"int8", "nf4"}:
        faults["base_precision"] = "must be same with dora, which measures the base's weights"
    if said.get("optimizer") == "schedule_free":
        if said.get("scheduler", "constant") != "constant":
            faults["scheduler"] = "must be constant with schedule_free"
        if said.get("ema_decay", 0.0) > 0:
            faults["ema_decay"] = "must be 0 with schedule_free, which averages the weights itself"
    return faults


# --- what each key takes ----------------------------------------------------------------------


def _is_whole(least: int, most: int, step: int = 1) -> tuple[Any, str]:
    def accept(got: object) -> bool:
        return type(got) is int and least <= got <= most and got % step == 0

    multiple = f", a multiple of {step}" if step > 1 else ""
    return accept, f"a whole number from {least} to {most}{multiple}"


def _is_real(least: float, most: float, *, above: bool = False) -> tuple[Any, str]:
    def accept(got: object) -> bool:
        if isinstance(got, bool) or not isinstance(got, (int, float)) or not math.isfinite(got):
            return False
        return (least < got if above else least <= got) and got <= most

    return (
        accept,
        f"a number {'above' if above else 'from'} {least} {'and' if above else 'to'} {most}",
    )


def _is_one_of(*choices: str) -> tuple[Any, str]:
    return (lambda got: isinstance(got, str) and got in choices), f"one of {', '.join(choices)}"


def _is_text(limit: int) -> tuple[Any, str]:
    def accept(got: object) -> bool:
        return isinstance(got, str) and len(got) <= limit and got.isprintable()

    return accept, f"a printable text of at most {limit} characters"


def _is_flag(got: object) -> bool:
    return isinstance(got, bool)


def _is_prompts(got: object) -> bool:
    return (
        isinstance(got, tuple)
        and len(got) <= 8
        and all(
            isinstance(item, str) and 0 < len(item) <= 500 and item.isprintable() for item in got
        )
    )


_snr, _snr_wants = _is_real(0, 100, above=True)
#: What each key takes: whether it does, and in words.
RULES: dict[str, tuple[Any, str]] = {
    "quality": _is_one_of("draft", "standard", "fine"),
    "steps": _is_whole(1, 100_000),
    "resolution": _is_whole(64, 2048, 64),
    "batch_size": _is_whole(1, 64),
    "gradient_accumulation": _is_whole(1, 64),
    "adapter": _is_one_of("lora", "dora", "lokr", "oft", "embedding"),
    "rank": _is_whole(1, 512),
    "alpha": _is_real(0, 1024, above=True),
    "targets": _is_one_of("attention", "full"),
    "text_encoder_rate": _is_real(0, 10),
    "lora_plus": _is_real(1, 64),
    "learning_rate": _is_real(0, 10, above=True),
    "optimizer": _is_one_of("adamw", "adamw8bit", "prodigy", "adafactor", "schedule_free"),
    "weight_decay": _is_real(0, 1),
    "max_grad_norm": _is_real(0, 1000, above=True),
    "scheduler": _is_one_of("constant", "cosine", "linear"),
    "warmup_steps": _is_whole(0, 100_000),
    "ema_decay": _is_real(0, 0.99999),
    "trigger": _is_text(100),
    "caption_template": _is_text(500),
    "caption_dropout": _is_real(0, 1),
    "caption_shuffle": (_is_flag, "true or false"),
    "keep_tokens": _is_whole(0, 100),
    "flip": (_is_flag, "true or false"),
    "masked_loss": (_is_flag, "true or false"),
    "prior_prompt": _is_text(500),
    "prior_images": _is_whole(0, 1000),
    "prior_weight": _is_real(0, 10, above=True),
    "min_snr_gamma": (lambda got: got is None or _snr(got), f"null or {_snr_wants}"),
    "debiased": (_is_flag, "true or false"),
    "noise_offset": _is_real(0, 1),
    "prediction": _is_one_of("auto", "epsilon", "v_prediction"),
    "timestep_sampling": _is_one_of("uniform", "logit_normal", "flux_shift"),
    "timestep_shift": _is_real(0, 100, above=True),
    "guidance": _is_real(0, 100),
    "validation_every": _is_whole(1, 100_000),
    "validation_share": _is_real(0, 0.5),
    "patience": _is_whole(0, 1000),
    "checkpoint_s": _is_real(0, 86_400),
    "keep_checkpoints": _is_whole(1, 100),
    "sample_prompts": (_is_prompts, "a list of at most 8 texts of 1 to 500 characters"),
    "sample_every": _is_whole(0, 100_000),
    "sample_seeds": _is_whole(1, 8),
    "precision": _is_one_of("auto", "bf16", "fp16", "fp32"),
    "base_precision": _is_one_of("auto", "same", "int8", "nf4"),
    "gradient_checkpointing": _is_one_of("auto", "on", "off"),
    "block_swap": _is_whole(-1, 100),
    "compile": _is_one_of("auto", "on", "off"),
    "cache": _is_one_of("auto", "ram", "disk"),
    "seed": _is_whole(0, 2**31 - 1),
}
