"""Device peaks: the right card, or none."""

import pytest

from tinygpt.errors import ConfigError
from tinygpt.hardware import memory_bandwidth, memory_bytes, peak_flops, similar_names


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
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_are_the_published_ones(name: str, tflops: float) -> None:
    assert peak_flops(name) == pytest.approx(tflops * 1e12, rel=5e-3)


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
     ("NVIDIA A100-SXM4-40GB", 40), ("NVIDIA H200", 140), ("Tesla T4", 15), ("NVIDIA L40S", 45), ("other", None)],
)  # fmt: skip
def test_memory_is_what_the_driver_says(name: str, gib: int | None) -> None:
    assert memory_bytes(name) == (None if gib is None else gib * 2**30)


def test_an_unknown_name_has_near_ones() -> None:
    assert similar_names("RTX 4075")[0] == "RTX 4070"
    assert "RTX 3060" in similar_names("geforce 3060")
    assert similar_names("toaster") == []
