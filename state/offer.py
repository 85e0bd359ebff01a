"""An offer of a GPU market, as a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Something that can be rented now. Prices are micro-USD per hour unless said otherwise."""

    id: str
    machine_id: str
    gpu_name: str
    num_gpus: int
    vram_gb: float
    #: GPU and disk of the size asked for.
    price: int
    storage_price: int
    #: micro-USD per GB
    download_price: int
    upload_price: int
    download_mbps: float
    upload_mbps: float
    reliability: float
    verified: bool
    cuda: float
    disk_gb: float
    geo: str = ""
    #: seconds that the machine can still be rented
    duration_s: float = 0.0
    dlperf: float = 0.0
    #: micro-USD per hour to bid for the GPU (in `price` already); 0 is on demand
    bid: int = 0
