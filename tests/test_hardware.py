"""Device peaks: the right card, or none."""

import subprocess
import sys

import pytest

from tinygpt.errors import ConfigError
from tinygpt.hardware import apple_gpu_name, memory_bandwidth, memory_bytes, peak_flops, similar_names


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        # Published rates with float32 accumulation, without sparsity.
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 3080", 59.5),
        ("NVIDIA GeForce RTX 3070", 40.6),
        ("NVIDIA GeForce RTX 4070", 58.3),
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5080", 112.6),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GeForce RTX 5060 Ti", 47.4),
        ("NVIDIA GH200 480GB", 1979 / 2),  # published with sparsity, as the next ones
        ("NVIDIA B200", 4500 / 2),
        ("NVIDIA GB200", 360_000 / 72 / 2),  # a rack of 72
        ("NVIDIA B300 SXM6 AC", 36_000 / 8 / 2),  # a board of 8
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 4 * 2 * 24_064 * 2617e-6),  # cores, MHz
        ("NVIDIA H20", 148.0),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI300A", 980.6),
        ("AMD Instinct MI325X", 1307.4),
        ("AMD Instinct MI250X", 383.0 / 2),  # published for two dies
        ("AMD Instinct MI210", 181.0),
    ],
)
def test_peaks_are_the_published_ones(name: str, tflops: float) -> None:
    assert peak_flops(name) == pytest.approx(tflops * 1e12, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "float32", "float16"),
    [
        # The Turing whitepaper's tables, reference boards, tensor cores with float32 accumulation.
        ("NVIDIA GeForce RTX 2080 Ti", 13.4, 53.8),
        ("NVIDIA GeForce RTX 2080", 10.1, 40.3),
        ("NVIDIA GeForce RTX 2070", 7.5, 29.9),
        ("NVIDIA TITAN RTX", 16.3, 130.5),
        # Published in float32 alone; the tables above have four times as much in tensor cores.
        ("NVIDIA GeForce RTX 2080 SUPER", 11.15, 4 * 11.15),
        ("NVIDIA GeForce RTX 2070 SUPER", 9.06, 4 * 9.06),
        ("NVIDIA GeForce RTX 2060 SUPER", 7.18, 4 * 7.18),
    ],
)
def test_turing_cards_have_the_published_peaks_and_no_bfloat16(name: str, float32: float, float16: float) -> None:
    assert peak_flops(name, "float32") == pytest.approx(float32 * 1e12, rel=7e-3)
    assert peak_flops(name, "float16") == pytest.approx(float16 * 1e12, rel=7e-3)
    assert peak_flops(name) is None


@pytest.mark.parametrize(
    ("name", "tflops", "bandwidth"),
    [
        # What Apple said of the largest GPU of a chip, and of its memory.
        ("Apple M1 8-core GPU", 2.6, 68),
        ("Apple M1 Max 32-core GPU", 10.4, 400),
        ("Apple M2 10-core GPU", 3.6, 100),
        ("Apple M2 Max 38-core GPU", 13.6, 400),
    ],
)
def test_apple_chips_have_a_float32_peak_alone(name: str, tflops: float, bandwidth: float) -> None:
    assert peak_flops(name, "float32") == pytest.approx(tflops * 1e12, rel=0.025)
    assert peak_flops(name) is None
    assert peak_flops(name, "float16") is None
    assert memory_bandwidth(name) == pytest.approx(bandwidth * 1e9, rel=0.01)
    assert memory_bytes(name) is None


def test_a_gpu_with_fewer_cores_has_a_lower_peak() -> None:
    seven, eight = (peak_flops(f"Apple M1 {cores}-core GPU", "float32") or 0 for cores in (7, 8))
    assert seven == pytest.approx(eight * 7 / 8)
    assert seven > 0


_IOREG = """+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x100000393, registered, active>
    {
      "model" = "Apple M1 Max"
      "gpu-core-count" = 32
    }
"""


@pytest.mark.parametrize(
    ("chip", "registry", "name"),
    [
        ("Apple M1 Max\n", _IOREG, "Apple M1 Max 32-core GPU"),
        ("Apple M1 Max\n", "", "Apple M1 Max"),  # 24 cores or 32: no peak rather than a wrong one
        ("Apple M1 Max\n", subprocess.TimeoutExpired("ioreg", 5), "Apple M1 Max"),
        ("Intel(R) Core(TM) i7-8559U CPU @ 2.70GHz\n", "", None),
        (FileNotFoundError("sysctl"), _IOREG, None),
    ],
)
def test_a_mac_is_asked_for_its_chip_and_cores(
    chip: str | Exception, registry: str | Exception, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        said = chip if "sysctl" in command[0] else registry
        if isinstance(said, Exception):
            raise said
        return subprocess.CompletedProcess(command, 0, said.encode(), b"")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert apple_gpu_name() == name
    assert (peak_flops(name or "", "float32") is not None) == (name == "Apple M1 Max 32-core GPU")
    asked.clear()
    monkeypatch.setattr(sys, "platform", "linux")
    assert apple_gpu_name() is None
    assert asked == []


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4070", "GeForce RTX 4070", "RTX 4070", "rtx4070", " RTX-4070 "])
def test_a_card_is_known_by_every_usual_spelling(name: str) -> None:
    assert peak_flops(name) == pytest.approx(58.3e12, rel=1e-3)
    assert peak_flops(name, "float32") == pytest.approx(29.15e12, rel=1e-3)
    assert memory_bandwidth(name) == 504e9


def test_sisters_are_told_apart() -> None:
    names = ["RTX 4070", "RTX 4070 SUPER", "RTX 4070 Ti", "RTX 4070 Ti SUPER"]
    peaks = [peak_flops(f"NVIDIA GeForce {name}") or 0.0 for name in names]
    assert peaks == sorted(set(peaks))
    assert peaks[0] > 0


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4070 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 2060",  # 6 GB or 12 GB, with other rates
        "NVIDIA GeForce RTX 2080 with Max-Q Design",
        "Quadro RTX 6000",  # with or without a fan
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "AMD Instinct MI250X/MI250",  # either
        "Apple M1",  # 7 cores or 8
        "Apple M9 Pro 99-core GPU",
        "Quadro P1000",
        "cpu",
        "",
    ],
)
def test_unknown_devices_give_none(name: str) -> None:
    assert peak_flops(name) is None
    assert memory_bandwidth(name) is None


def test_a_device_without_the_units_gives_none() -> None:
    assert peak_flops("Tesla T4") is None
    assert peak_flops("Tesla T4", "float16") == 65e12


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype='int4' is not in the table; choose bfloat16, float16, float32"):
        peak_flops("RTX 4090", "int4")


@pytest.mark.parametrize(
    ("name", "gib"),
    [("RTX 3060", 12), ("RTX 4070", 12), ("RTX 4070 Ti SUPER", 16), ("NVIDIA GeForce RTX 4090", 24), ("RTX 5090", 32),
     ("NVIDIA A100-SXM4-40GB", 40), ("NVIDIA H200", 140), ("Tesla T4", 15), ("NVIDIA L40S", 45), ("other", None),
     ("RTX 2080 Ti", 11), ("NVIDIA B200", 179), ("AMD Instinct MI250X", 64), ("AMD Instinct MI300A", None)],
)  # fmt: skip
def test_memory_is_what_the_driver_says(name: str, gib: int | None) -> None:
    assert memory_bytes(name) == (None if gib is None else gib * 2**30)


def test_an_unknown_name_has_near_ones() -> None:
    assert similar_names("RTX 4075")[0] == "RTX 4070"
    assert "RTX 3060" in similar_names("geforce 3060")
    assert similar_names("toaster") == []
