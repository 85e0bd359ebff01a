"""How much GPU memory a training needs, worked out before anything is rented.

Standard library only, for both sides read it: the server rents no machine that is too small, the
trainer takes the fastest *way* to train that fits the machine it is on (`gpu_agent.lora.fit`, which
also tries it). A way trades time for memory: fewer images at once, activations computed again
instead of kept, frozen weights rounded to fewer bits, blocks waiting on the host.

The peak of a training is the largest of three, for they follow one another: encoding images and
texts, training, and painting. Training itself adds up weights, the adapter with its optimizer, and
activations, which grow with images and pixels alone, for attention keeps no matrix of all pairs.
All of `Geometry` but the encoders' sizes was measured on the real networks without their weights
(docs/trainer.md, "Memory"). GiB throughout, but for what is compared with offers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from gpu_agent.recipe import ROUNDED, Recipe


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What of a family's network decides how much memory it takes.

    Pairs are for the targets `attention` and `full`; those of `fixed` without and with
    checkpointing.

    Attributes:
        parameters: of the denoiser, in 10⁹.
        linear: share of them in the linear layers of its repeated blocks: what can be rounded,
            and can wait on the host.
        blocks: how many repeated blocks there are.
        adapter: parameters of a LoRA of rank 1, in 10⁶.
        kept: activations of one image of 2²⁰ pixels in bf16.
        again: the same, where they are computed again.
        fixed: what of `kept` and `again` the text takes, whatever the image's size.
        encoders: weights of the text encoders, as they are loaded.
        vae: its weights, in fp32.
        encode, decode: the VAE's activations for 2²⁰ pixels, in fp32.
    """

    parameters: float
    linear: float
    blocks: int
    adapter: tuple[float, float]
    kept: tuple[float, float]
    again: tuple[float, float]
    fixed: tuple[float, float] = (0.0, 0.0)
    encoders: float
    vae: float = 0.31
    encode: float = 2.5
    decode: float = 3.0

    def resized(self, parameters: float, linear: float, blocks: int) -> Geometry:
        """Of another network of the family, as SD 3.5 large is: its weights are known, and the
        rest grows with depth and width, while weights grow with depth and width squared."""
        bigger = (parameters / self.parameters) ** (2 / 3)

        def both(pair: tuple[float, float]) -> tuple[float, float]:
            return (pair[0] * bigger, pair[1] * bigger)

        return replace(
            self,
            parameters=parameters,
            linear=linear,
            blocks=blocks,
            adapter=both(self.adapter),
            kept=both(self.kept),
            again=both(self.again),
            fixed=both(self.fixed),
        )


#: The network that most people train of each family: SD 3.5 medium, not large, for instance.
GEOMETRIES: Mapping[str, Geometry] = {
    "sd1": Geometry(
        parameters=0.860,
        linear=0.28,
        blocks=16,
        adapter=(0.20, 0.43),
        kept=(4.33, 5.06),
        again=(1.03, 1.30),
        encoders=0.46,
    ),
    "sd2": Geometry(
        parameters=0.866,
        linear=0.29,
        blocks=16,
        adapter=(0.21, 0.43),
        kept=(4.17, 4.90),
        again=(0.87, 1.15),
        encoders=1.27,
    ),
    "sdxl": Geometry(
        parameters=2.567,
        linear=0.85,
        blocks=70,
        adapter=(1.45, 2.66),
        kept=(7.27, 8.37),
        again=(0.67, 0.75),
        fixed=(0.10, 0.0),
        encoders=3.05,
    ),
    "sd3": Geometry(
        parameters=2.243,
        linear=0.99,
        blocks=24,
        adapter=(0.75, 1.47),
        kept=(9.02, 10.7),
        again=(0.78, 0.98),
        fixed=(0.59, 0.06),
        encoders=11.9,
    ),
    "flux": Geometry(
        parameters=11.901,
        linear=0.99,
        blocks=57,
        adapter=(1.64, 2.81),
        kept=(27.6, 30.1),
        again=(2.33, 2.33),
        fixed=(3.11, 0.26),
        encoders=9.33,
    ),
    "lumina2": Geometry(
        parameters=2.610,
        linear=0.99,
        blocks=30,
        adapter=(0.46, 1.50),
        kept=(21.1, 24.4),
        again=(2.86, 3.29),
        fixed=(1.26, 0.20),
        encoders=4.87,
    ),
    "hunyuanimage": Geometry(
        parameters=17.426,
        linear=0.97,
        blocks=60,
        adapter=(2.07, 3.57),
        kept=(17.8, 19.4),
        again=(1.58, 1.66),
        fixed=(9.49, 0.94),
        encoders=16.3,
        vae=1.51,
        encode=1.5,
        decode=1.75,
    ),
    "anima": Geometry(
        parameters=1.956,
        linear=0.99,
        blocks=28,
        adapter=(0.86, 1.44),
        kept=(14.1, 16.5),
        again=(1.10, 1.34),
        fixed=(0.36, 0.02),
        encoders=1.36,
        vae=0.47,
        encode=4.88,
        decode=6.76,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a training.

    Attributes:
        images: per forward pass; a batch of the recipe takes as many passes as it must.
        checkpointing: compute activations again in the backward pass.
        base: of the frozen linear layers: `same` as the rest, `int8` or `nf4`.
        swapped: how many blocks wait on the host.
        slowness: a guess of the time that a step takes beside the fastest way.
    """

    images: int = 1
    checkpointing: bool = False
    base: str = "same"
    swapped: int = 0
    slowness: float = 1.0

    def __str__(self) -> str:
        words = [f"{self.images} image{'s' if self.images > 1 else ''} at once"]
        words += ["gradient checkpointing"] if self.checkpointing else []
        words += [f"an {self.base} base"] if self.base != "same" else []
        words += [f"{self.swapped} blocks on the host"] if self.swapped else []
        return ", ".join(words)


#: Guesses, of SimpleTuner's published H100 figures and of what each way does beside the training
#: proper; only the order of ways, and a little that of offers, depends on them.
_SLOW_AGAIN = 1.4
_SLOW_BASE = {"same": 1.0, "int8": 1.3, "nf4": 1.6}
_SLOW_SWAP = 1.0
#: A forward pass costs so many images' time besides its images: launches.
_SLOW_PASS = 0.3
#: Bytes per weight; nf4 has a scale in bf16 for each 64 of half a byte, int8 one per row.
_BYTES = {"int8": 1.0, "nf4": 0.5 + 2 / 64}
#: Bytes per trained parameter: itself, its gradient, its copy in bf16, and the optimizer's state.
_TRAINED = {"adamw": 18, "adamw8bit": 12, "prodigy": 26, "adafactor": 11, "schedule_free": 18}
#: Shares of the blocks that may wait on the host, where the recipe leaves it open.
_SHARES = (0.25, 0.5, 0.75)
#: Swapped blocks that are on the GPU at a time: the one in use, and the next.
SLOTS = 2
#: DoRA also keeps what its base and its direction said of each layer. A guess.
_DORA = 1.5
#: fp32 activations beside those of bf16, of which some are fp32 anyway. A guess.
_WIDE = 1.6
#: CUDA's context, its libraries and their workspaces, and what the allocator cannot use.
CONTEXT = 0.9
FRAGMENTED = 1.06
#: A decoder that does not fit goes over the image in tiles of 512 px.
_TILE = 0.25
#: By which power of a network's parameters its time grows. A guess.
_HEAVIER = 0.7
#: GB of disk for the agent's image, the dataset, caches, checkpoints and results.
_DISK_BESIDES = 25.0
_GIB = 2**30


def ways(recipe: Recipe, geometry: Geometry, *, resorts: bool = True) -> list[Way]:
    """Those that the recipe allows, the fastest first.

    Args:
        resorts: also nf4 and blocks on the host where the recipe leaves them open. They cost
            quality, and memory of a host that nobody knows before it is rented.
    """
    sizes = [recipe.batch_size]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    checkpointing = {"auto": (False, True), "on": (True,), "off": (False,)}
    bases: tuple[str, ...] = (recipe.base_precision,)
    if recipe.base_precision == "auto":
        able = ROUNDED.get(recipe.adapter, ("same", "int8", "nf4"))
        bases = able if resorts else able[:2]
    swaps = [min(recipe.block_swap, geometry.blocks - SLOTS)]
    if recipe.block_swap < 0:
        shares = _SHARES if resorts and recipe.adapter != "dora" else ()
        swaps = [0, *(int(share * geometry.blocks) for share in shares)]
    found = []
    for images, again, base, swapped in product(
        sizes, checkpointing[recipe.gradient_checkpointing], bases, swaps
    ):
        slowness = (1 + _SLOW_PASS / images) / (1 + _SLOW_PASS / recipe.batch_size)
        slowness *= (_SLOW_AGAIN if again else 1.0) * _SLOW_BASE[base]
        slowness *= 1 + _SLOW_SWAP * swapped / geometry.blocks
        found.append(
            Way(
                images=images,
                checkpointing=again,
                base=base,
                swapped=swapped,
                slowness=round(slowness, 3),
            )
        )
    return sorted(found, key=lambda way: way.slowness)


def training(recipe: Recipe, geometry: Geometry, way: Way) -> float:
    """What a step takes at its peak: weights, adapter, optimizer, activations."""
    full = recipe.targets == "full"
    megapixels = recipe.resolution**2 / 2**20
    fixed = geometry.fixed[way.checkpointing]
    at_a_megapixel = (geometry.again if way.checkpointing else geometry.kept)[full]
    activations = way.images * (fixed + (at_a_megapixel - fixed) * megapixels)
    activations *= (_DORA if recipe.adapter == "dora" else 1.0) * _widened(recipe, _WIDE)
    encoders = geometry.encoders if _trains_texts(recipe) else 0.0
    return standing(recipe, geometry, way) + activations + encoders


def peak(recipe: Recipe, geometry: Geometry, way: Way) -> float:
    """The most that PyTorch allocates from loading to the end."""
    megapixels = recipe.resolution**2 / 2**20
    stays = standing(recipe, geometry, way)
    encoding = geometry.encoders + geometry.vae + geometry.encode * megapixels
    painting = stays + geometry.vae
    painting += geometry.decode * min(megapixels, _TILE)
    return max(encoding, training(recipe, geometry, way), painting)


def of_a_card(allocated: float) -> float:
    """GiB that a GPU must have for PyTorch to allocate so many."""
    return allocated * FRAGMENTED + CONTEXT


def rungs(recipe: Recipe, family: str) -> tuple[tuple[float, float], ...]:
    """What memory buys: (GB as offers count them, slowness), from the least to the fastest.

    On less than the first the training would not run, or run only by way of what the recipe did
    not order (see `ways`).
    """
    geometry = GEOMETRIES[family]
    found: list[tuple[float, float]] = []
    for way in ways(recipe, geometry, resorts=False):
        room = _as_offered(of_a_card(peak(recipe, geometry, way)))
        if not found or room < found[-1][0]:
            found.append((room, way.slowness))
    return tuple(reversed(found))


def least(recipe: Recipe, family: str) -> float:
    """GB, as offers count them, without which a GPU is not worth renting."""
    return rungs(recipe, family)[0][0]


def base_gb(family: str) -> float:
    """GB of the family's base model, its denoiser at half precision."""
    geometry = GEOMETRIES[family]
    return geometry.parameters * 2.0 + (geometry.encoders + geometry.vae) * _GIB / 1e9


def disk(family: str) -> float:
    """GB of disk that a training of the family takes, its base model's files first of all."""
    return float(math.ceil(base_gb(family) + _DISK_BESIDES))


def heaviness(family: str) -> float:
    """How much longer one image takes than one of SD 1.x of the same size. A guess: large
    networks use a GPU better, so that time grows more slowly than parameters."""
    return math.pow(GEOMETRIES[family].parameters / GEOMETRIES["sd1"].parameters, _HEAVIER)


def _as_offered(gib: float) -> float:
    """Markets offer thousands of MiB for GB: 24 GiB are sold as 24.576, or a little less."""
    return math.ceil(gib * 1.024 * 2) / 2


def standing(recipe: Recipe, geometry: Geometry, way: Way) -> float:
    """Weights, adapter and optimizer: what stays from step to step."""
    whole = 2.0 * _widened(recipe, 2.0)
    swapping = max(0, way.swapped - SLOTS) / geometry.blocks
    linear = geometry.linear * (1 - swapping) * _BYTES.get(way.base, whole)
    weights = geometry.parameters * 1e9 * ((1 - geometry.linear) * whole + linear)
    trained = geometry.adapter[recipe.targets == "full"] * 1e6 * recipe.rank
    trained *= _TRAINED[recipe.optimizer] + (4 if recipe.ema_decay else 0)
    return (weights + trained) / _GIB


def _trains_texts(recipe: Recipe) -> bool:
    return recipe.adapter == "embedding" or recipe.text_encoder_rate > 0


def _widened(recipe: Recipe, factor: float) -> float:
    return factor if recipe.precision == "fp32" else 1.0
