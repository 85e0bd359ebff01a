"""The sandbox's hosts: a small, believable market. Prices are of the order seen in 2026."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

HOURS_PER_MONTH = 730
DAY_S = 86_400.0


#: What nvidia-smi calls the GPUs that the market names otherwise.
DRIVER_NAMES = {
    "RTX A5000": "NVIDIA RTX A5000",
    "RTX A6000": "NVIDIA RTX A6000",
    "A100 PCIE": "NVIDIA A100-PCIE-40GB",
    "A100 SXM4": "NVIDIA A100-SXM4-80GB",
    "H100 SXM": "NVIDIA H100 80GB HBM3",
    "H100 PCIE": "NVIDIA H100 PCIe",
}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a machine is, seen from within: memory in MiB of one GPU, disk in GB, Mbit/s, and
    seconds that its clock is ahead."""

    gpu_name: str
    gpu_ram: int
    num_gpus: int
    driver_version: str
    compute_cap: int
    disk_gb: float
    download_mbps: float
    clock_skew_s: float = 0.0
    #: The disk is not the one that was rented.
    lies_of_disk: bool = False

    @property
    def driver_name(self) -> str:
        """As nvidia-smi prints it."""
        return DRIVER_NAMES.get(self.gpu_name, f"NVIDIA GeForce {self.gpu_name}")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine that is for rent. Dollars; $/h, $/GB and month for storage, $/GB for bytes."""

    machine_id: int
    host_id: int
    gpu_name: str
    #: MB of one GPU
    gpu_ram: int
    compute_cap: int
    dlperf: float
    dph_base: float
    min_bid: float
    storage_cost: float
    inet_down_cost: float
    inet_up_cost: float
    #: Mbit/s
    inet_down: float
    inet_up: float
    reliability: float
    verification: str
    geolocation: str
    disk_space: float
    cuda_max_good: float = 12.8
    driver_version: str = "570.86.15"
    num_gpus: int = 1
    cpu_cores: int = 32
    cpu_cores_effective: float = 16.0
    cpu_ram: int = 128_000
    hosting_type: int = 0
    duration_s: float = 30 * DAY_S
    boot_s: float = 45.0

    def truth(self, disk: float) -> Truth:
        """An honest host's, where a disk of so many GB was rented."""
        return Truth(
            gpu_name=self.gpu_name,
            gpu_ram=self.gpu_ram,
            num_gpus=self.num_gpus,
            driver_version=self.driver_version,
            compute_cap=self.compute_cap,
            disk_gb=disk,
            download_mbps=self.inet_down,
        )

    def offer(self, ask: int, disk: float, *, bid: bool = False) -> dict[str, Any]:
        """The offer object of the REST, for a disk of so many GB."""
        gpu = self.min_bid if bid else self.dph_base
        storage = self.storage_cost * disk / HOURS_PER_MONTH
        prices = {"gpuCostPerHour": gpu, "diskHour": storage, "totalHour": gpu + storage}
        return {
            "id": ask,
            "ask_contract_id": ask,
            "bundle_id": 100_000 + self.machine_id,
            "machine_id": self.machine_id,
            "host_id": self.host_id,
            "hosting_type": self.hosting_type,
            "resource_type": "gpu",
            "gpu_name": self.gpu_name,
            "num_gpus": self.num_gpus,
            "gpu_ram": self.gpu_ram,
            "gpu_total_ram": self.gpu_ram * self.num_gpus,
            "gpu_frac": 1.0,
            "gpu_arch": "nvidia",
            "compute_cap": self.compute_cap,
            "cuda_max_good": self.cuda_max_good,
            "driver_version": self.driver_version,
            "cpu_arch": "amd64",
            "cpu_cores": self.cpu_cores,
            "cpu_cores_effective": self.cpu_cores_effective,
            "cpu_name": "AMD EPYC 7543 32-Core Processor",
            "cpu_ram": self.cpu_ram,
            "disk_space": self.disk_space,
            "disk_bw": 2400.0,
            "disk_name": "nvme",
            "inet_down": self.inet_down,
            "inet_up": self.inet_up,
            "inet_down_cost": self.inet_down_cost,
            "inet_up_cost": self.inet_up_cost,
            "direct_port_count": 16,
            "static_ip": True,
            "public_ipaddr": "203.0.113.7",
            "geolocation": self.geolocation,
            "reliability": self.reliability,
            "reliability2": self.reliability,
            "verification": self.verification,
            "rentable": True,
            "rented": False,
            "external": False,
            "is_bid": bid,
            "min_bid": self.min_bid,
            "dph_base": gpu,
            "dph_total": gpu + storage,
            "storage_cost": self.storage_cost,
            "storage_total_cost": storage,
            "dlperf": self.dlperf,
            "dlperf_per_dphtotal": self.dlperf / (gpu + storage),
            "score": self.dlperf / (gpu + storage) * self.reliability,
            "total_flops": self.dlperf * 0.8,
            "duration": self.duration_s,
            "end_date": None,
            "pci_gen": 4.0,
            "pcie_bw": 24.0,
            "has_avx": 1,
            "search": prices,
            "time_remaining": "",
        }


#: GPU, MB, compute capability, dlperf, $/h, Mbit/s down, reliability, verification, place
MARKET: tuple[tuple[str, int, int, float, float, float, float, str, str], ...] = (
    ("RTX 3060", 12288, 860, 8.5, 0.07, 420, 0.972, "verified", "Ontario, CA"),
    ("RTX 3090", 24576, 860, 20.1, 0.17, 760, 0.991, "verified", "Czechia, CZ"),
    ("RTX 3090", 24576, 860, 19.6, 0.13, 95, 0.942, "unverified", "Sichuan, CN"),
    ("RTX A5000", 24564, 860, 18.9, 0.21, 880, 0.994, "verified", "Quebec, CA"),
    ("RTX 4090", 24564, 890, 45.8, 0.34, 840, 0.996, "verified", "Ohio, US"),
    ("RTX 4090", 24564, 890, 44.9, 0.29, 610, 0.968, "unverified", "Poland, PL"),
    ("RTX 4090", 24564, 890, 46.2, 0.41, 3200, 0.998, "verified", "Sweden, SE"),
    ("RTX A6000", 49140, 860, 22.4, 0.42, 930, 0.993, "verified", "Texas, US"),
    ("RTX 5090", 32607, 1200, 71.3, 0.55, 1900, 0.987, "verified", "Norway, NO"),
    ("A100 PCIE", 40960, 800, 49.7, 0.58, 2100, 0.989, "verified", "Virginia, US"),
    ("A100 SXM4", 81920, 800, 53.0, 0.86, 5400, 0.997, "verified", "Netherlands, NL"),
    ("H100 SXM", 81559, 900, 118.0, 1.87, 7800, 0.999, "verified", "Iceland, IS"),
    ("H100 PCIE", 81559, 900, 94.5, 1.68, 4100, 0.871, "deverified", "France, FR"),
)


def seeded(seed: int) -> list[Host]:
    """The market's hosts; the same seed gives the same ones."""
    rng = random.Random(seed)
    hosts = []
    for index, (
        gpu,
        ram,
        capability,
        dlperf,
        price,
        down,
        reliability,
        verified,
        place,
    ) in enumerate(MARKET):
        dph = round(price * rng.uniform(0.95, 1.05), 4)
        hosts.append(
            Host(
                machine_id=30_000 + 137 * index + rng.randrange(100),
                host_id=60_000 + rng.randrange(9_000),
                gpu_name=gpu,
                gpu_ram=ram,
                compute_cap=capability,
                dlperf=dlperf,
                dph_base=dph,
                min_bid=round(dph * 0.55, 4),
                storage_cost=round(rng.uniform(0.1, 0.25), 3),
                inet_down_cost=rng.choice((0.0, 0.002, 0.004)),
                inet_up_cost=rng.choice((0.002, 0.004, 0.01)),
                inet_down=down,
                inet_up=round(down * rng.uniform(0.3, 0.9), 1),
                reliability=reliability,
                verification=verified,
                geolocation=place,
                disk_space=round(rng.uniform(180, 1800), 1),
                hosting_type=int(down > 2000),
                boot_s=round(rng.uniform(20, 90), 1),
            )
        )
    return hosts
