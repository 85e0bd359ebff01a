"""Links to base models as a browser shows them, and what sites call the families of models.

Standard library only; `infra.models` asks the sites.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gpu_agent.recipe import FAMILIES, REPOSITORIES

_CIVITAI = frozenset({"civitai.com", "civitai.green", "civitai.red"})
_HUB = frozenset({"huggingface.co", "hf.co"})
_NUMBER = "[1-9][0-9]{0,11}"
_VERSION = re.compile(rf"civitai:({_NUMBER})")
#: `urn:air:sd1:checkpoint:civitai:4384@128713`, or its end.
_AIR = re.compile(rf"(?:urn:air:[a-z0-9]+:[a-z]+:)?civitai:({_NUMBER})(?:@({_NUMBER}))?", re.I)
_MODEL_PAGE = re.compile(rf"/models/({_NUMBER})(?:/.*)?")
_DOWNLOAD = re.compile(rf"/api/(?:download/models|v1/model-versions)/({_NUMBER})/?")
_HUB_PAGE = re.compile(
    r"/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<how>tree|blob|resolve|raw)/(?P<revision>[^/]+)(?:/(?P<file>.+?))?)?/?"
)
#: What Civitai calls a model's kind, of those that are no base to train on.
_NO_BASE = "is a {kind}, and no base model that one trains on"


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a model on Civitai; or a model, of which the newest is meant."""

    version: str = ""
    model: str = ""


def understood(link: str, civitai_url: str, hub_url: str) -> Version | str | None:
    """What a pasted link means: a version on Civitai, or a base's address (`hf:…`, `s3:…`,
    `https://…`); None when it is neither."""
    link = link.strip()
    if found := _VERSION.fullmatch(link):
        return Version(version=found[1])
    if found := _AIR.fullmatch(link):
        return Version(version=found[2] or "", model=found[1])
    if link.startswith(("hf:", "s3:")):
        return link
    if not link.startswith(("https://", "http://")):
        # as people paste it
        if not re.match(r"(?:www\.)?(?:civitai\.(?:com|green|red)|huggingface\.co|hf\.co)/", link):
            return None
        link = f"https://{link}"
    try:
        parts = urlsplit(link)
        host = (parts.hostname or "").removeprefix("www.")
    except ValueError:
        return None
    if host in _CIVITAI | _hosts(civitai_url) and (said := _civitai(parts.path, parts.query)):
        return said
    if host in _HUB | _hosts(hub_url):
        return _hub(parts.path)
    return None if host in _CIVITAI else link


def _hosts(url: str) -> frozenset[str]:
    return frozenset({urlsplit(url).hostname or ""})


def _civitai(path: str, query: str) -> Version | None:
    if found := _DOWNLOAD.fullmatch(path):
        return Version(version=found[1])
    if found := _MODEL_PAGE.fullmatch(path):
        named = parse_qs(query).get("modelVersionId", [""])[0]
        version = named if re.fullmatch(_NUMBER, named) else ""
        return Version(version=version, model=found[1])
    return None


def _hub(path: str) -> str | None:
    found = _HUB_PAGE.fullmatch(unquote(path))
    if found is None or found["repo"].startswith(("datasets/", "spaces/", "docs/", "papers/")):
        return None
    revision = found["revision"] or "main"
    at = "" if revision == "main" else f"@{revision}"
    file = f"/{found['file']}" if found["file"] and found["how"] != "tree" else ""
    return f"hf:{found['repo']}{at}{file}"


# --- what sites call families -----------------------------------------------------------------

#: Civitai's `baseModel`, by how it begins, in lower case.
_BASE_MODELS: Mapping[str, str] = {
    "sd 1": "sd1",
    "sd 2": "sd2",
    "sdxl": "sdxl",
    "pony": "sdxl",
    "illustrious": "sdxl",
    "noobai": "sdxl",
    "sd 3": "sd3",
    "flux.1": "flux",
    "lumina": "lumina2",
    "hunyuanimage": "hunyuanimage",
    "hunyuan image": "hunyuanimage",
    "anima": "anima",
}
#: The hub's tags.
_TAGS: Mapping[str, str] = {
    "diffusers:stablediffusionxlpipeline": "sdxl",
    "diffusers:stablediffusion3pipeline": "sd3",
    "diffusers:fluxpipeline": "flux",
    "diffusers:lumina2pipeline": "lumina2",
    "diffusers:hunyuanimagepipeline": "hunyuanimage",
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3",
    "flux": "flux",
}


def family_on_civitai(base_model: str) -> str | None:
    """Ours, of what Civitai calls it; None when nobody here trains it."""
    said = base_model.lower().strip()
    # what comes after FLUX.1 is another network
    return next((ours for begin, ours in _BASE_MODELS.items() if said.startswith(begin)), None)


def family_on_hub(repo: str, tags: Iterable[str]) -> str | None:
    """Ours, of a repository; None when its tags do not say."""
    owners = {theirs.lower(): ours for ours, theirs in REPOSITORIES.items()}
    if repo.lower() in owners:
        return owners[repo.lower()]
    said = [tag.lower() for tag in tags]
    for tag in said:
        of = tag.removeprefix("base_model:").rpartition(":")[2]
        if tag.startswith("base_model:") and of in owners:
            return owners[of]
    return next((_TAGS[tag] for tag in said if tag in _TAGS), None)


def fault_on_civitai(kind: str, base_model: str) -> str:
    """Why a model cannot be a base; empty where it can."""
    if kind and kind.lower() not in ("checkpoint", "other"):
        return _NO_BASE.format(kind=kind)
    if base_model and family_on_civitai(base_model) is None:
        return f"is a {base_model}; what can be trained is {', '.join(FAMILIES)}"
    return ""


def fault_on_hub(tags: Iterable[str], gated: object, has_token: bool) -> str:
    said = {tag.lower() for tag in tags}
    if said & {"lora", "template:sd-lora", "textual_inversion"}:
        return _NO_BASE.format(kind="LoRA" if "textual_inversion" not in said else "embedding")
    if gated and not has_token:
        return "is gated: set HF_TOKEN to a token whose owner accepted its terms"
    return ""


def words(value: Any) -> tuple[str, ...]:
    """Trigger words, as a site lists them; whatever is no text is left out."""
    listed = value if isinstance(value, list) else [value]
    cleaned = (item.strip() for item in listed if isinstance(item, str))
    return tuple(item[:200] for item in cleaned if item)[:20]
