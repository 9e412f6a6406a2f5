"""Put a GGUF where LM Studio or Ollama finds it, or into a folder to give away."""

import difflib
import errno
import filecmp
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmforge.deploy.lmstudio import in_wsl, lmstudio_models_folder, windows_path
from llmforge.deploy.modelfile import check_ollama_name, is_untouched, modelfile, ollama_name
from llmforge.errors import CheckpointError, ConfigError, ConvertError
from llmforge.formats.atomic import WriteError, atomic_file
from llmforge.formats.gguf import read_gguf_header

TARGETS = ("ollama", "lmstudio")
_CHUNK_BYTES = 1 << 23
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}  # on Windows

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class DeployReport:
    """What was done, or would be; `str(report)` says it in words."""

    target: str  # "ollama", "lmstudio" or the folder
    gguf: Path  # where the programs find it
    modelfile: Path | None = None
    name: str  # that the model has there
    dry_run: bool = False
    done: list[str] = field(default_factory=list)  # sentences
    notes: list[str] = field(default_factory=list)
    next_commands: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'would have ' if self.dry_run else ''}{sentence}" for sentence in self.done]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"{'next ' if i == 0 else '     '} {command}" for i, command in enumerate(self.next_commands)]
        return "\n".join(lines)


def deploy_gguf(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    name: str | None = None,
    publisher: str = "llmforge",
    system: str | None = None,
    num_ctx: int | None = None,
    base: str | os.PathLike[str] | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    link: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> DeployReport:
    """Give a GGUF to LM Studio or Ollama, or copy it into a folder with all that they need.

    Args:
        path: the file; a LoRA adapter as a GGUF goes to Ollama or a folder, with `base`.
        to: "lmstudio": copied to `<models>/<publisher>/<name>/<file>.gguf`. "ollama": a Modelfile is written beside the file, and
            `ollama create` is run where that program is. Anything else: a folder that gets the file, a Modelfile and a README.
        name: of the model there; None = made of the file's name.
        publisher: LM Studio's folder above it.
        system: what the model is told before every conversation (Modelfile).
        num_ctx: tokens of context (Modelfile); None = what the model has, at most 8192.
        base: of an adapter: its base model as a GGUF, or a model of Ollama's.
        models_dir: LM Studio's folder of models; None = where LM Studio has it.
        out: folder of the Modelfile; None = that of the GGUF.
        link: a hard link instead of a copy, on the same disk.
        overwrite: replace another model that is there.
        dry_run: look and check, but write and run nothing.
        progress: called with bytes copied and bytes in all.
    Raises:
        CheckpointError: not a GGUF, or one that is damaged or cut off.
        ConfigError: an unknown target, or a name or value that cannot be.
        WriteError: no permission, no space, or another model is there.
        ConvertError: Ollama refuses it.
    """
    path, target = Path(path), _target(to)
    header = read_gguf_header(path)
    metadata = header.metadata
    if metadata.get("split.count", 0) not in (0, 1):
        raise ConfigError(f"{path} is one of {metadata['split.count']} parts; join them with llama-gguf-split --merge")
    job = _Job(
        path=path,
        metadata=metadata,
        is_adapter=metadata.get("general.type") == "adapter",
        base=None if base is None else os.fspath(base),
        system=system.replace("\r\n", "\n") if system is not None else None,
        num_ctx=num_ctx,
        link=link,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )
    if job.is_adapter and job.base is None:
        raise ConfigError(f"{path} is a LoRA adapter; name its base with --base: a GGUF, or a model of Ollama's")
    if job.base is not None and not job.is_adapter:
        raise ConfigError(f"base is {job.base!r}, but {path} is a whole model; leave it out")
    if target == "lmstudio":
        return _to_lmstudio(job, name, publisher, models_dir)
    called = check_ollama_name(name if name is not None else ollama_name(path.stem))
    if target == "ollama":
        return _to_ollama(job, called, Path(out) if out is not None else path.parent)
    return _to_folder(job, called, Path(target))


@dataclass(frozen=True, kw_only=True)
class _Job:
    path: Path
    metadata: Mapping[str, Any]
    is_adapter: bool
    base: str | None
    system: str | None
    num_ctx: int | None
    link: bool
    overwrite: bool
    dry_run: bool
    progress: Progress | None


def _target(to: str | os.PathLike[str]) -> str:
    """ "ollama", "lmstudio", or a folder."""
    text = os.fspath(to)
    if text in TARGETS:
        return text
    if not text.strip():
        raise ConfigError("the target is empty; give ollama, lmstudio or a folder")
    is_path = os.sep in text or "/" in text or text.startswith((".", "~")) or Path(text).is_dir()
    near = difflib.get_close_matches(re.sub(r"[\W_]", "", text.lower()), TARGETS, n=1, cutoff=0.7)
    if near and not is_path and isinstance(to, str):
        raise ConfigError(f"unknown target {text!r}; did you mean {near[0]!r}? A folder of that name is ./{text}")
    return str(Path(text).expanduser())


# LM Studio


def _to_lmstudio(
    job: _Job, name: str | None, publisher: str, models_dir: str | os.PathLike[str] | None
) -> DeployReport:
    if job.is_adapter:
        raise ConfigError(f"{job.path} is a LoRA adapter, which LM Studio cannot load; merge it into its base first")
    folder = _folder_name("name", name if name is not None else _plain_name(job.path.stem))
    publisher = _folder_name("publisher", publisher)
    models = Path(models_dir).expanduser() if models_dir is not None else lmstudio_models_folder()
    if not models.is_dir() and models_dir is not None and not models.parent.is_dir():
        raise ConfigError(f"{models} is no folder, and neither is {models.parent}; is it LM Studio's models folder?")
    file = job.path.name if job.path.suffix.lower() == ".gguf" else f"{job.path.name}.gguf"
    place = models / publisher / folder / file
    done = [_put(job, place)]
    notes = []
    if job.system is not None or job.num_ctx is not None:
        notes.append("LM Studio keeps system prompt and context length in its own settings: set them there")
    return DeployReport(
        target="lmstudio",
        gguf=place,
        name=f"{publisher}/{folder}",
        dry_run=job.dry_run,
        done=done,
        notes=notes,
        next_commands=[f"lms load {shlex.quote(f'{publisher}/{folder}')}", f"or in LM Studio: My Models, {folder}"],
    )


def _plain_name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", stem).strip("-._+")[:100] or "model"


def _folder_name(what: str, name: str) -> str:
    if _FOLDER_NAME.fullmatch(name) is None or name.endswith(".") or name.lower().split(".")[0] in _RESERVED:
        raise ConfigError(
            f"{what} {name!r} must be the name of a folder on any system: letters, digits, '.', '_', '+' and '-', at most 100; "
            f"try {_plain_name(name)!r}"
        )
    return name


def _put(job: _Job, place: Path) -> str:
    """Copy or link the file to its place; the sentence that says it."""
    size = job.path.stat().st_size
    if _exists(place):
        if os.path.samefile(job.path, place):
            return f"left {place}: it is the file itself"
        if not place.is_file():
            raise WriteError(f"cannot write {place}: a folder stands there; remove it, or choose another name")
        if filecmp.cmp(job.path, place, shallow=False):
            return f"left {place}: it has the same content already"
        if not job.overwrite:
            raise WriteError(
                f"{place} exists and is another model; choose another name, or replace it with --overwrite"
            )
    what = f"{'linked' if job.link else 'copied'} {job.path} to {place} ({_size(size)})"
    if not job.link:
        _need_space(place, size)
    if job.dry_run:
        return what
    with atomic_file(place) as tmp:
        if job.link:
            tmp.unlink()
            _link(job.path, tmp)
        else:
            _copy(job.path, tmp, size, job.progress)
    return what


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError as error:
        raise WriteError(f"cannot write {place}: {error.strerror or error}") from error


def _need_space(place: Path, size: int) -> None:
    """Before gigabytes are copied: is there room?"""
    folder = next((parent for parent in place.parents if parent.is_dir()), None)
    if folder is None:
        return
    free = shutil.disk_usage(folder).free
    if free < size:
        raise WriteError(
            f"cannot write {place}: it needs {_size(size)}, and {_size(free)} are free there; free some space, choose another "
            "place, or on the same disk take a hard link (--link)"
        )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise WriteError(
                f"cannot link {source} to {target.parent}: they are on different disks, or the disk has no hard links; leave out "
                "--link"
            ) from error
        raise


def _copy(source: Path, target: Path, size: int, progress: Progress | None) -> None:
    done = 0
    try:
        stream = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror or error}") from error
    with stream, target.open("wb") as out:
        while chunk := stream.read(_CHUNK_BYTES):
            out.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, size)
    if done != size:
        raise CheckpointError(f"{source} changed while it was copied: {done:,} bytes, {size:,} before; try again")


# Ollama


def _to_ollama(job: _Job, name: str, folder: Path) -> DeployReport:
    program = _ollama()
    on_windows = program is not None and program.lower().endswith(".exe") and in_wsl()
    # Beside the file its own name is enough, and the two can be moved together.
    beside = _is_same_folder(folder, job.path.parent)
    gguf = f"./{job.path.name}" if beside else _absolute(job.path, on_windows)
    base = job.base if job.base is not None else ""
    if _is_file(base):
        base = (
            f"./{Path(base).name}" if _is_same_folder(folder, Path(base).parent) else _absolute(Path(base), on_windows)
        )
    text, notes = _modelfile_of(job, gguf, base)
    place = folder / "Modelfile"
    command = [program or "ollama", "create", name, "-f", windows_path(place) if on_windows else str(place)]
    done = [_write_modelfile(job, place, text)]
    following = [f"ollama run {name}"]
    if program is None:
        following.insert(0, shlex.join(["ollama", *command[1:]]))
        notes.append("the program ollama is not on the PATH; install it from ollama.com, then type the command below")
    else:
        done.append(f"run {shlex.join(command)}")
        if not job.dry_run:
            _run_ollama(command)
    return DeployReport(
        target="ollama",
        gguf=job.path,
        modelfile=place,
        name=name,
        dry_run=job.dry_run,
        done=done,
        notes=notes,
        next_commands=following,
    )


def _modelfile_of(job: _Job, gguf: str, base: str) -> tuple[str, list[str]]:
    """The Modelfile; an adapter's settings come from the base's file, wherever the Modelfile says that it is."""
    if not job.is_adapter:
        return modelfile(gguf, job.metadata, system=job.system, num_ctx=job.num_ctx)
    options: dict[str, Any] = {"adapter": gguf, "system": job.system, "num_ctx": job.num_ctx}
    if _is_file(job.base or ""):
        header = read_gguf_header(job.base or "")
        if header.metadata.get("general.type") == "adapter":
            raise ConfigError(f"{job.base} is an adapter too; name the model that it was trained on")
        return modelfile(base, header.metadata, **options)
    if job.base is not None and (job.base.endswith(".gguf") or Path(job.base).exists()):
        raise ConfigError(f"the base {job.base} is no file; give a GGUF, or the name of a model of Ollama's")
    return modelfile(check_ollama_name(base), {}, **options)


def _write_modelfile(job: _Job, place: Path, text: str) -> str:
    """Write it, unless that would replace another's; the sentence that says it."""
    if _exists(place):
        try:
            there = place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WriteError(f"cannot read {place}, which is there already: {error}") from error
        if not is_untouched(there, text) and not job.overwrite:
            raise WriteError(
                f"{place} exists and is of another model, or was changed; name another folder with --out, or replace it with "
                "--overwrite"
            )
    if not job.dry_run:
        with atomic_file(place) as tmp:
            tmp.write_text(text, encoding="utf-8", newline="\n")
    return f"written {place}"


def _ollama() -> str | None:
    """The program; inside WSL the one of Windows where Linux has none."""
    found = shutil.which("ollama")
    return found if found is not None or not in_wsl() else shutil.which("ollama.exe")


def _run_ollama(command: list[str]) -> None:
    """Raises ConvertError: with Ollama's own words."""
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise ConvertError(f"cannot run {command[0]}: {error.strerror or error}") from error
    if done.returncode != 0:
        words = (done.stderr + b"\n" + done.stdout).decode("utf-8", errors="replace")
        lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", words).splitlines() if line.strip()]
        raise ConvertError(
            f"ollama create failed (exit code {done.returncode}): {' | '.join(lines[-4:]) or 'without a word'}; the Modelfile is "
            f"written, so when Ollama runs type: {shlex.join(['ollama', *command[1:]])}"
        )


def _is_file(path: str) -> bool:
    try:
        return bool(path) and Path(path).is_file()
    except OSError:
        return False


def _is_same_folder(left: Path, right: Path) -> bool:
    return left.resolve() == right.resolve()


def _absolute(path: Path, on_windows: bool) -> str:
    return windows_path(path.resolve()) if on_windows else str(path.resolve())


# A folder


def _to_folder(job: _Job, name: str, folder: Path) -> DeployReport:
    if _exists(folder) and not folder.is_dir():
        raise WriteError(f"cannot write {folder}: it is a file; name a folder")
    place = folder / job.path.name
    base, done = job.base or "", []
    if _is_file(base):
        base_place = folder / Path(base).name
        base = f"./{base_place.name}"
    text, notes = _modelfile_of(job, f"./{place.name}", base)
    # First what may be refused without gigabytes copied.
    wrote = _write_modelfile(job, folder / "Modelfile", text)
    done.append(_put(job, place))
    if base.startswith("./") and job.base is not None:
        done.append(_put(_of_base(job), folder / Path(job.base).name))
    done.append(wrote)
    readme = folder / "README.md"
    if (
        not _exists(readme)
        or job.overwrite
        or readme.read_text(encoding="utf-8", errors="replace").startswith(_HEADING)
    ):
        if not job.dry_run:
            with atomic_file(readme) as tmp:
                tmp.write_text(_readme(job, place.name, name, base), encoding="utf-8", newline="\n")
        done.append(f"written {readme}")
    else:
        notes.append(f"{readme} is yours and stays as it is")
    run = ["llama-cli", "-m", str(place)]
    if job.is_adapter:
        run = ["llama-cli", "-m", str(folder / base) if base.startswith("./") else "BASE.gguf", "--lora", str(place)]
    return DeployReport(
        target=str(folder),
        gguf=place,
        modelfile=folder / "Modelfile",
        name=name,
        dry_run=job.dry_run,
        done=done,
        notes=notes,
        next_commands=[shlex.join(run), shlex.join(["ollama", "create", name, "-f", str(folder / "Modelfile")])],
    )


def _of_base(job: _Job) -> _Job:
    return _Job(**{**job.__dict__, "path": Path(job.base or "")})


_HEADING = "<!-- Written by llmforge deploy -->"


def _readme(job: _Job, file: str, name: str, base: str) -> str:
    quoted = shlex.quote(file)
    if job.is_adapter:
        model = shlex.quote(base.removeprefix("./")) if base.startswith("./") else "BASE.gguf"
        llama_cpp = f"llama-cli -m {model} --lora {quoted}"
    else:
        llama_cpp = f"llama-cli -m {quoted}"
    sections = [
        f"{_HEADING}\n# {name}\n\nType the commands in this folder.",
        f"## Ollama\n\n```sh\nollama create {name} -f Modelfile\nollama run {name}\n```\n\n"
        "The Modelfile has the form of the conversation, where answers end, and the context; change it and create again.",
        f"## llama.cpp\n\n```sh\n{llama_cpp}\n```",
    ]
    if not job.is_adapter:
        folder = _plain_name(job.path.stem)
        sections.insert(
            1,
            "## LM Studio\n\nLM Studio sees a file two folders below its models folder only, as `publisher/model/file.gguf`:\n\n"
            f"```sh\nmkdir -p ~/.lmstudio/models/llmforge/{folder}\n"
            f"cp {quoted} ~/.lmstudio/models/llmforge/{folder}/\nlms load llmforge/{folder}\n```",
        )
    return "\n\n".join(sections) + "\n"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
