"""Compile the kernels: with nvcc for GPUs, with a C++ compiler for the emulator that tests use.

Both use libtorch's stable ABI, so builds take seconds, and a library works with every PyTorch from
2.11 on. Also used by setup.py, before megagrow is installed, so nothing of megagrow is imported at
module level.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
# In the checkout, or in the package if setup.py copied them there.
_PLACES = [base / "kernels" / "csrc" for base in (HERE.parent, HERE.parent.parent)]
SOURCES = next((place for place in _PLACES if place.is_dir()), _PLACES[-1])
CUDA_LIBRARY = HERE / "lib" / "libmegagrow_cuda.so"

# Two translation units of about equal cost: each parses the headers once, and two cores are used.
UNITS = (("norm", "rope", "xent"), ("adamw", "boxes", "act"))
ARCHITECTURES = ("8.0", "9.0a", "10.0")
_OLDEST_TORCH = "0x020b000000000000"  # 2.11


class BuildError(RuntimeError):
    """A compiler is missing or failed."""


def nvcc() -> str | None:
    """The path of nvcc: from CUDA_HOME, or on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin/nvcc").exists():
        return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc")


def cxx() -> str | None:
    """The path of the C++ compiler: CXX, or the first of c++, g++ and clang++."""
    named = os.environ.get("CXX")
    names = [named] if named else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def architectures() -> list[str]:
    """CUDA targets as TORCH_CUDA_ARCH_LIST names them (``8.0;9.0a;10.0``, the default)."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    return [name.removesuffix("+PTX") for name in listed] or list(ARCHITECTURES)


def gencode(architecture: str) -> str:
    """The nvcc option for a target such as ``9.0a``."""
    number = architecture.replace(".", "")
    return f"-gencode=arch=compute_{number},code=sm_{number}"


def source_hash(*more: str, sources: Path = SOURCES) -> str:
    """A hash of the sources and of everything else a build depends on."""
    digest = hashlib.sha256()
    for path in sorted(sources.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    digest.update("\0".join((*more, _OLDEST_TORCH)).encode())
    return digest.hexdigest()[:16]


def emulated_library(
    *,
    namespace: str = "megagrow_emulated",
    sources: Path = SOURCES,
    units: Sequence[Sequence[str]] = UNITS,
    flags: Sequence[str] | None = None,
) -> Path:
    """The emulator's library, from the cache, or built in a few seconds.

    Args:
        namespace: the namespace in which its ops are registered.
        sources: the kernel sources; a test may pass modified ones.
        units: file names under cuda/, by translation unit.
        flags: compiler flags; default: MEGAGROW_EMULATOR_FLAGS, or -O1.

    Raises:
        BuildError: there is no C++ compiler, or it fails.
    """
    import torch

    compiler = cxx()
    if compiler is None:
        raise BuildError("no C++ compiler on PATH")
    _require(sources)
    if flags is None:
        flags = os.environ.get("MEGAGROW_EMULATOR_FLAGS", "-O1").split()
    files = ",".join("+".join(unit) for unit in units)
    key = source_hash(namespace, files, *flags, torch.__version__, compiler, sources=sources)
    library = cache() / f"emulated_{key}.so"
    if not library.exists():
        common = [
            compiler, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-w", "-U_FORTIFY_SOURCE",
            *(["-fno-gnu-unique"] if "clang" not in compiler else []),
            f"-DMG_NAMESPACE={namespace}", *_torch_flags(system=True), *flags,
        ]  # fmt: skip
        _build(
            library,
            units=units,
            sources=sources,
            suffix="cpp",
            compile_unit=lambda text, into: [*common, "-c", text, "-o", into],
            link=lambda objects, into: [
                compiler, "-shared", *flags, *objects, *_torch_libraries("torch_cpu"), "-o", into
            ],
        )  # fmt: skip
        if key != source_hash(
            namespace, files, *flags, torch.__version__, compiler, sources=sources
        ):  # fmt: skip
            library.unlink()
            raise BuildError("the sources were changed while they were compiled")
    return library


def cuda_library(library: Path = CUDA_LIBRARY) -> Path:
    """Build the CUDA library for `architectures()`; takes half a minute to a few minutes.

    Raises:
        BuildError: nvcc is missing or fails.
    """
    compiler = nvcc()
    if compiler is None:
        raise BuildError("nvcc is neither in CUDA_HOME nor on PATH")
    _require(SOURCES)
    targets = [gencode(name) for name in architectures()]
    # Only in a GPU build of torch; without one the library links, but loads only elsewhere.
    with_cuda = (_torch_root() / "lib" / "libtorch_cuda.so").exists()
    libraries = _torch_libraries("torch_cpu", *(["torch_cuda"] if with_cuda else []))
    _build(
        library,
        units=UNITS,
        sources=SOURCES,
        suffix="cu",
        compile_unit=lambda text, into: [*nvcc_command(compiler), *targets, "-c", text, "-o", into],
        link=lambda objects, into: [
            compiler, "-shared", *targets, *objects, *(_for_nvcc(f) for f in libraries), "-o", into
        ],
    )  # fmt: skip
    return library


def nvcc_command(compiler: str) -> list[str]:
    """The nvcc command line without targets, input and output."""
    return [
        compiler, "-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden",
        *_torch_flags(system=False),
    ]  # fmt: skip


def unit_text(unit: Sequence[str], *, sources: Path = SOURCES) -> str:
    """The source text of a translation unit."""
    return "".join(f'#include "{sources}/cuda/{name}.cu"\n' for name in unit)


def cache() -> Path:
    """The cache directory of test builds; MEGAGROW_CACHE overrides it."""
    named = os.environ.get("MEGAGROW_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (Path(named) if named else base / "megagrow") / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def jobs() -> int:
    """The number of parallel compilers: MAX_JOBS, or one per core, at most two."""
    return int(os.environ.get("MAX_JOBS") or min(2, os.cpu_count() or 1))


def run_compilers(commands: Sequence[Sequence[str | Path]]) -> list[str]:
    """Run commands in parallel; returns their output.

    Raises:
        BuildError: one fails; the message has its output.
    """

    def run(command: Sequence[str | Path]) -> str:
        words = [str(word) for word in command]
        # A preloaded library, such as a sanitizer, is not meant for compilers.
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env=environment
        )  # fmt: skip
        if done.returncode:
            text = (done.stderr + done.stdout).strip()[-4000:]
            raise BuildError(f"{' '.join(words)}\nended with {done.returncode}:\n{text}")
        return done.stdout + done.stderr

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(run, commands))


def _require(sources: Path) -> None:
    if not (sources / "cuda").is_dir():
        raise BuildError(f"the kernels' sources are not in {sources}")


def _build(  # type: ignore[no-untyped-def]
    library: Path, *, units, sources: Path, suffix: str, compile_unit, link
) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as place:
        texts, objects = [], []
        for number, unit in enumerate(units):
            text = Path(place) / f"unit{number}.{suffix}"
            text.write_text(unit_text(unit, sources=sources), encoding="utf-8")
            texts.append(text)
            objects.append(text.with_suffix(".o"))
        run_compilers([compile_unit(t, o) for t, o in zip(texts, objects, strict=True)])
        made = Path(place) / library.name
        run_compilers([link(objects, made)])
        os.replace(made, library)


def _torch_root() -> Path:
    import torch

    return Path(torch.__file__).parent


def _torch_flags(*, system: bool) -> list[str]:
    include = _torch_root() / "include"
    words = [f"-DTORCH_TARGET_VERSION={_OLDEST_TORCH}"]
    for folder in (include, include / "torch/csrc/api/include"):
        words += ["-isystem", str(folder)] if system else [f"-I{folder}"]
    return words


def _torch_libraries(*names: str) -> list[str]:
    folder = _torch_root() / "lib"
    return [f"-L{folder}", *(f"-l{name}" for name in names), f"-Wl,-rpath,{folder}"]


def _for_nvcc(flag: str) -> str:
    return f"-Xlinker={flag.removeprefix('-Wl,').replace(',', '=', 1)}" if "-Wl," in flag else flag


def optional_cuda_library(environment: Mapping[str, str] = os.environ) -> str:
    """Build the CUDA library if possible; returns one line: what was built, or why not.

    MEGAGROW_CUDA=0 skips it; MEGAGROW_CUDA=1 makes a failure an error.
    """
    wanted = environment.get("MEGAGROW_CUDA", "auto")
    try:
        import torch

        has_gpu_torch = torch.version.cuda is not None
    except ImportError:
        has_gpu_torch, torch = False, None  # type: ignore[assignment]
    reason = None
    if wanted == "0":
        reason = "MEGAGROW_CUDA=0"
    elif torch is None:
        reason = "PyTorch cannot be imported here (install with --no-build-isolation)"
    elif nvcc() is None:
        reason = "nvcc is neither in CUDA_HOME nor on PATH"
    elif not has_gpu_torch and wanted != "1":
        reason = "this PyTorch is a build without CUDA"
    if reason is None:
        try:
            return (
                f"megagrow: CUDA kernels built for {', '.join(architectures())}: {cuda_library()}"
            )
        except BuildError as error:
            if wanted == "1":
                raise
            print(error, file=sys.stderr)
            reason = "nvcc failed, see above"
    elif wanted == "1":
        raise BuildError(f"MEGAGROW_CUDA=1, but {reason}")
    return f"megagrow: CUDA kernels not built, PyTorch's own ops serve: {reason}"
