"""The device that a command runs on."""

import torch


def choose_device(name: str | None) -> torch.device:
    """Return the named device, or the GPU if there is one, else the CPU.

    Raises:
        ValueError: If there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices = available_devices()
    try:
        device = torch.device(name)
    except RuntimeError as error:  # not even the name of one
        raise ValueError(f"--device {name!r} is not a device; here, it is {' or '.join(devices)}") from error
    # torch counts in 8 bits: to it, cuda:256 is cuda:0.
    if str(device) != name or device.type not in devices or (device.index or 0) >= devices[device.type]:
        there = [kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}" for kind, count in devices.items()]
        raise ValueError(f"there is no device {name!r} here, only {' and '.join(there)}")
    return device


def available_devices() -> dict[str, int]:
    """Return the kinds of devices that torch can compute on here, and how many there are of each."""
    devices = {"cpu": 1}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices[accelerator.type] = torch.accelerator.device_count()
    return devices
