"""Peak arithmetic, memory and its speed of common devices, by the name the driver gives them.

Dense rates without sparsity, at the vendor's boost clock. On GeForce cards the 16-bit tensor cores run at half rate
when they accumulate in float32, which is what torch does. Memory is from the same pages as the rates; where one name
stands for two sizes it is the smaller, but for the RTX 3060 the common one. Cards with GDDR memory that are sold with
error correction on lose a sixteenth of it. A GPU that shares the memory of a processor has None.

A device that is not listed gives None: a wrong peak is worse than none. So has one whose name another device bears too,
with other rates: the RTX 2060 (6 and 12 GB), the RTX 3050, Quadro RTX cards (with and without a fan), and the MI250,
which drivers call MI250X/MI250. Nor can a name tell that an AMD card was partitioned.
"""

import difflib
import re
import subprocess
import sys
from typing import NamedTuple

from tinygpt.errors import ConfigError

__all__ = ["apple_gpu_name", "memory_bandwidth", "memory_bytes", "peak_flops", "similar_names"]


class _Device(NamedTuple):
    """TFLOP/s in bfloat16, float16 and float32 (no TF32), GB/s, GiB; None where unknown or unsupported."""

    bfloat16: float | None
    float16: float | None
    float32: float | None
    bandwidth: float | None
    memory: float | None


def _geforce(cores: int, boost_mhz: int, bandwidth: float, memory: int) -> _Device:
    """Derive the rates of an Ampere, Ada or Blackwell GeForce card from its number of shader cores and clock."""
    float32 = 2 * cores * boost_mhz * 1e-6
    return _Device(2 * float32, 2 * float32, float32, bandwidth, memory)


def _turing(cores: int, boost_mhz: int, bandwidth: float, memory: int) -> _Device:
    """Derive those of a Turing GeForce card: the same tensor rate to half as many cores, and no bfloat16."""
    float32 = 2 * cores * boost_mhz * 1e-6
    return _Device(None, 4 * float32, float32, bandwidth, memory)


def _apple(cores: int, boost_mhz: int, bandwidth: float) -> _Device:
    """Derive the float32 rate of an Apple GPU: 128 multiply-adds a core and clock. No other rate is documented."""
    return _Device(None, None, 2 * 128 * cores * boost_mhz * 1e-6, bandwidth, None)


_DEVICES = {
    # NVIDIA Turing GPU architecture whitepaper, reference boards (the Founders Editions of 2070, 2080 and 2080 Ti clock
    # up to 6 % higher), and GeForce RTX 20 SUPER product pages. The whitepaper has 56.9 TFLOP/s for that 2080 Ti with
    # float32 sums, and https://github.com/nlzy/turing-unlock measured 53 to 56. The TITAN RTX sums at the full rate.
    "RTX 2060 SUPER": _turing(2176, 1650, 448.0, 8),
    "RTX 2070": _turing(2304, 1620, 448.0, 8),
    "RTX 2070 SUPER": _turing(2560, 1770, 448.0, 8),
    "RTX 2080": _turing(2944, 1710, 448.0, 8),
    "RTX 2080 SUPER": _turing(3072, 1815, 496.0, 8),
    "RTX 2080 Ti": _turing(4352, 1545, 616.0, 11),
    "TITAN RTX": _Device(None, 130.5, 16.3, 672.0, 24),
    # NVIDIA Ampere GA102 whitepaper and GeForce RTX 30 product pages. The 3060 is the 12 GB card, the 3060 Ti the
    # GDDR6 one, the 3080 the 10 GB one; their variants have the same name and differ by a few per cent in arithmetic.
    "RTX 3060": _geforce(3584, 1777, 360.0, 12),
    "RTX 3060 Ti": _geforce(4864, 1665, 448.0, 8),
    "RTX 3070": _geforce(5888, 1725, 448.0, 8),
    "RTX 3070 Ti": _geforce(6144, 1770, 608.3, 8),
    "RTX 3080": _geforce(8704, 1710, 760.3, 10),
    "RTX 3080 Ti": _geforce(10240, 1665, 912.4, 12),
    "RTX 3090": _geforce(10496, 1695, 936.2, 24),
    "RTX 3090 Ti": _geforce(10752, 1860, 1008.0, 24),
    # NVIDIA Ada GPU architecture whitepaper and GeForce RTX 40 product pages.
    "RTX 4060": _geforce(3072, 2460, 272.0, 8),
    "RTX 4060 Ti": _geforce(4352, 2535, 288.0, 8),
    "RTX 4070": _geforce(5888, 2475, 504.0, 12),
    "RTX 4070 SUPER": _geforce(7168, 2475, 504.0, 12),
    "RTX 4070 Ti": _geforce(7680, 2610, 504.0, 12),
    "RTX 4070 Ti SUPER": _geforce(8448, 2610, 672.0, 16),
    "RTX 4080": _geforce(9728, 2505, 716.8, 16),
    "RTX 4080 SUPER": _geforce(10240, 2550, 736.0, 16),
    "RTX 4090": _geforce(16384, 2520, 1008.0, 24),
    # NVIDIA RTX Blackwell GPU architecture whitepaper and GeForce RTX 50 product pages.
    "RTX 5060": _geforce(3840, 2497, 448.0, 8),
    "RTX 5060 Ti": _geforce(4608, 2572, 448.0, 8),
    "RTX 5070": _geforce(6144, 2512, 672.0, 12),
    "RTX 5070 Ti": _geforce(8960, 2452, 896.0, 16),
    "RTX 5080": _geforce(10752, 2617, 960.0, 16),
    "RTX 5090": _geforce(21760, 2407, 1792.0, 32),
    # NVIDIA RTX A6000 datasheet; NVIDIA RTX 6000 Ada Generation datasheet; NVIDIA RTX Blackwell PRO GPU architecture
    # whitepaper (24,064 cores at 2,617 MHz, tensor cores at full rate). nvidia-smi shows 97,887 MiB of its memory.
    "RTX A6000": _Device(154.8, 154.8, 38.7, 768.0, 48),
    "RTX 6000 Ada Generation": _Device(364.2, 364.2, 91.1, 960.0, 48),
    "RTX PRO 6000 Blackwell Workstation Edition": _Device(503.8, 503.8, 126.0, 1792.0, 95),
    # NVIDIA A100 datasheet.
    "A100-SXM4-40GB": _Device(312.0, 312.0, 19.5, 1555.0, 40),
    "A100-PCIE-40GB": _Device(312.0, 312.0, 19.5, 1555.0, 40),
    "A100-SXM4-80GB": _Device(312.0, 312.0, 19.5, 2039.0, 80),
    "A100 80GB PCIe": _Device(312.0, 312.0, 19.5, 1935.0, 80),
    # NVIDIA H100 and H200 datasheets, which list rates with sparsity: halved. The 80 GB HBM3 name is the SXM5 board.
    "H100 80GB HBM3": _Device(989.4, 989.4, 66.9, 3350.0, 80),
    "H100 PCIe": _Device(756.5, 756.5, 51.2, 2000.0, 80),
    "H100 NVL": _Device(835.5, 835.5, 60.0, 3900.0, 94),
    "H200": _Device(989.4, 989.4, 66.9, 4800.0, 140),
    # NVIDIA GH200 Grace Hopper Superchip datasheet: the GPU of the H100 SXM with more memory of its own, 96 GB of HBM3
    # where the name has the processor's 480GB. Torch sees 94.5 GiB of it, and 153,008,209,920 bytes of the 144 GB.
    "GH200 480GB": _Device(989.4, 989.4, 66.9, 4000.0, 94.5),
    "GH200 144G HBM3e": _Device(989.4, 989.4, 66.9, 4900.0, 142.5),
    # H20: NVIDIA shows no datasheet to the public; https://huggingface.co/hardware/h20, sellers agree.
    "H20": _Device(148.0, 148.0, 44.0, 4000.0, 95),
    # NVIDIA Blackwell datasheet, "Individual Blackwell GPU Specifications", with sparsity: halved. A GB200 is one of
    # its two GPUs. NVIDIA HGX B300 datasheet, as https://github.com/NVIDIA/cosmos-framework/pull/114 reads it.
    # Memory is what nvidia-smi says: 183,359, 189,471 and 275,040 MiB.
    "B200": _Device(2250.0, 2250.0, 75.0, 7700.0, 179),
    "GB200": _Device(2500.0, 2500.0, 80.0, 8000.0, 185),
    "B300 SXM6 AC": _Device(2250.0, 2250.0, None, None, 268),
    # NVIDIA L4, L40S, A10, A30 and A40 datasheets. Memory is what nvidia-smi says: 23,034 MiB of an L4's 24 GB and
    # 46,068 of an L40S's 48, https://github.com/modal-labs/modal-client/pull/2797.
    "L4": _Device(121.0, 121.0, 30.3, 300.0, 22.5),
    "L40S": _Device(362.05, 362.05, 91.6, 864.0, 45),
    "A10": _Device(125.0, 125.0, 31.2, 600.0, 22.5),
    "A30": _Device(165.0, 165.0, 10.3, 933.0, 24),
    "A40": _Device(149.7, 149.7, 37.4, 696.0, 45),
    # NVIDIA T4 and V100 datasheets: no bfloat16 units. Sources for the T4's memory differ (300, 320).
    "T4": _Device(None, 65.0, 8.1, None, 15),
    "V100-SXM2-16GB": _Device(None, 125.0, 15.7, 900.0, 16),
    "V100-SXM2-32GB": _Device(None, 125.0, 15.7, 900.0, 32),
    "V100-PCIE-16GB": _Device(None, 112.0, 14.0, 900.0, 16),
    "V100-PCIE-32GB": _Device(None, 112.0, 14.0, 900.0, 32),
    # AMD Instinct MI300X, MI300A, MI325X, MI250X and MI210 data sheets. Their matrix cores multiply true float32, so
    # the float32 rate is theirs. A device is one of the two dies of an MI250X. An MI300A shares its memory.
    "MI300X": _Device(1307.4, 1307.4, 163.4, 5300.0, 192),
    "MI300A": _Device(980.6, 980.6, 122.6, 5300.0, None),
    "MI325X": _Device(1307.4, 1307.4, 163.4, 6000.0, 256),
    "MI250X": _Device(191.5, 191.5, 47.85, 1638.4, 64),
    "MI210": _Device(181.0, 181.0, 45.3, 1638.4, 64),
    # Clocks and bandwidths: https://github.com/philipturner/applegpuinfo. They give what Apple said: 2.6 TFLOP/s for 8
    # cores of M1, 3.6 for 10 of M2. That 16-bit arithmetic is no faster was measured on M1 alone
    # (https://github.com/philipturner/metal-benchmarks), so its rate is left out, as are later chips: no clock is sure.
    **{
        f"Apple {chip} {cores}-core GPU": _apple(cores, boost_mhz, bandwidth)
        for chip, boost_mhz, bandwidth, sizes in (
            ("M1", 1278, 68.2, (7, 8)),
            ("M1 Pro", 1296, 200.0, (14, 16)),
            ("M1 Max", 1296, 400.0, (24, 32)),
            ("M1 Ultra", 1296, 800.0, (48, 64)),
            ("M2", 1398, 100.0, (8, 10)),
            ("M2 Pro", 1398, 200.0, (16, 19)),
            ("M2 Max", 1398, 400.0, (30, 38)),
            ("M2 Ultra", 1398, 800.0, (60, 76)),
        )
        for cores in sizes
    },
}

_DTYPES = ("bfloat16", "float16", "float32")
_VENDOR = re.compile(r"^(NVIDIA|AMD)?\s*(GEFORCE|TESLA|INSTINCT)?\s*")


def _key(name: str) -> str:
    """Reduce a name to what tells cards apart, so that `NVIDIA GeForce RTX 4070` and `rtx4070` are one."""
    return re.sub(r"[\s_-]+", "", _VENDOR.sub("", name.strip().upper()))


_BY_KEY = {_key(name): device for name, device in _DEVICES.items()}


def peak_flops(device_name: str, dtype: str = "bfloat16") -> float | None:
    """Return the dense peak of a device in FLOP/s, a multiply-add counted as two.

    Args:
        device_name: As `torch.cuda.get_device_name()` or `apple_gpu_name` gives it. The whole name must be known: a
            laptop variant or a slice of a partitioned GPU is not the card it is named after.
        dtype: `"bfloat16"`, `"float16"` or `"float32"` (without TF32).

    Returns:
        The peak, or None if the device is unknown or has no units for the dtype.

    Raises:
        ConfigError: If the dtype is not one of the three.

    Example:
        ```python
        peak_flops("NVIDIA GeForce RTX 4070")  # 5.83e13
        ```
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not in the table; choose {', '.join(_DTYPES)}.")
    device = _BY_KEY.get(_key(device_name))
    rate = getattr(device, dtype) if device else None
    return rate * 1e12 if rate is not None else None


def memory_bandwidth(device_name: str) -> float | None:
    """Return the memory bandwidth of a device in bytes/s, or None if it is unknown.

    Args:
        device_name: As for `peak_flops`.
    """
    device = _BY_KEY.get(_key(device_name))
    return device.bandwidth * 1e9 if device and device.bandwidth is not None else None


def memory_bytes(device_name: str) -> int | None:
    """Return the memory of a device in bytes, or None if it is unknown or shared with the processor.

    Of it the driver, a desktop and the CUDA context take some hundred MiB.

    Args:
        device_name: As for `peak_flops`.
    """
    device = _BY_KEY.get(_key(device_name))
    return int(device.memory * 2**30) if device and device.memory is not None else None


def apple_gpu_name() -> str | None:
    """Return the name of the GPU of a Mac, such as `"Apple M2 Max 38-core GPU"`, or None elsewhere.

    A chip is sold with more or fewer GPU cores under one name, so they are counted; where macOS does not tell, the name
    is that of the chip alone, of which no peak is known.
    """
    if sys.platform != "darwin":
        return None
    chip = _said(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]).strip()
    if not chip.startswith("Apple"):
        return None
    cores = re.search(r'"gpu-core-count" = (\d+)', _said(["/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d", "1"]))
    return f"{chip} {cores[1]}-core GPU" if cores else chip


def _said(command: list[str]) -> str:
    """Return what a command prints, or nothing if it fails."""
    try:
        return subprocess.run(command, capture_output=True, timeout=5, check=True).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""


def similar_names(device_name: str) -> list[str]:
    """Return up to four names that the table knows and that look like this one, the nearest first."""
    near = difflib.get_close_matches(_key(device_name), _BY_KEY, n=4, cutoff=0.5)
    names = {_key(name): name for name in _DEVICES}
    return [names[key] for key in near]
