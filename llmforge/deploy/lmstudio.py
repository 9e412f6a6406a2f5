"""Where LM Studio keeps its models: on Linux, macOS, Windows, and on the Windows side of WSL2.

The root is `downloadsFolder` of `<home>/settings.json`, or `<home>/models`; <home> is what `~/.lmstudio-home-pointer` names, or else
`~/.lmstudio`, or else `~/.cache/lm-studio` of older versions. Below the root a model is `publisher/model/file.gguf`: one that lies
anywhere else is not seen.
"""

import json
import os
import re
import subprocess
from pathlib import Path

from llmforge.config import read_json_object
from llmforge.errors import ConfigError, some

PROC_VERSION = Path("/proc/version")  # names Microsoft inside WSL
WINDOWS_USERS = Path("/mnt/c/Users")  # inside WSL, unless /etc/wsl.conf says otherwise
_NOT_PEOPLE = {"all users", "default", "default user", "public", "defaultapppool"}
_TIMEOUT_SECONDS = 20  # for cmd.exe and wslpath, which start in a second


def lmstudio_models_folder() -> Path:
    """The folder of LM Studio's models on this computer.

    Raises:
        ConfigError: LM Studio is not here, or several users have it.
    """
    windows = _windows_homes() if in_wsl() else []
    found = [folder for home in windows if (folder := _models_of(home)) is not None]
    if len(found) > 1:
        raise ConfigError(
            f"several Windows users have LM Studio ({some([str(folder) for folder in found])}); say which folder with --models-dir"
        )
    folder = found[0] if found else _models_of(Path.home())
    if folder is None:
        homes = [str(home) for home in (*windows, Path.home())]
        raise ConfigError(
            f"LM Studio was not found for {some(homes)}; start it once, or give its models folder with --models-dir (LM Studio shows "
            "it under My Models)"
        )
    return folder


def in_wsl() -> bool:
    """Whether this is Linux inside Windows."""
    try:
        return "microsoft" in PROC_VERSION.read_text(encoding="utf-8", errors="replace").lower()
    except OSError:
        return False


def windows_path(path: Path) -> str:
    r"""The path as Windows programs know it, from inside WSL: /mnt/c/models/a.gguf -> C:\models\a.gguf.

    Raises:
        ConfigError: wslpath does not answer.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())  # wslpath knows what exists
    told = _ask(["wslpath", "-w", str(there)])
    if told is None:
        raise ConfigError(f"wslpath does not say how Windows calls {path}; copy the file below /mnt/c")
    return "\\".join([told.rstrip("\\"), *path.absolute().parts[len(there.absolute().parts) :]])


def _windows_homes() -> list[Path]:
    """The home of the Windows user who started WSL, where Windows says it; all homes where it does not."""
    told = _ask(["cmd.exe", "/d", "/c", "echo %USERPROFILE%"])
    if told is not None and "%" not in told:
        home = _from_windows(told)
        if home is not None and home.is_dir():
            return [home]
    try:
        return sorted(
            entry for entry in WINDOWS_USERS.iterdir() if entry.is_dir() and entry.name.lower() not in _NOT_PEOPLE
        )
    except OSError:
        return []


def _models_of(home: Path) -> Path | None:
    """The models folder of the LM Studio that a user has; None: they have none."""
    candidates = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    try:
        told = (home / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        told = ""
    if told and (pointed := _from_windows(told)) is not None:
        candidates.insert(0, pointed)
    for folder in candidates:
        try:
            if not folder.is_dir():
                continue
        except OSError:  # another user's
            continue
        return _downloads_folder(folder / "settings.json") or folder / "models"
    return None


def _downloads_folder(settings: Path) -> Path | None:
    """What the settings say, where they say it; a file that cannot be read says nothing."""
    try:
        value = read_json_object(settings, max_bytes=2**22).get("downloadsFolder")
    except (OSError, ValueError, json.JSONDecodeError):
        return None
    return _from_windows(value) if isinstance(value, str) and value.strip() else None


def _from_windows(path: str) -> Path | None:
    """A path that a file or a program of Windows names, as this system has it: inside WSL C:\\Users\\ana is /mnt/c/Users/ana."""
    drive = re.fullmatch(r"([A-Za-z]):[\\/]*(.*)", path.strip())
    if drive is None or os.name == "nt":
        return Path(path.strip()).expanduser()
    if not in_wsl():
        return None
    told = _ask(["wslpath", "-u", path.strip()])
    return Path(told) if told is not None else WINDOWS_USERS.parents[1] / drive[1].lower() / drive[2].replace("\\", "/")


def _ask(command: list[str]) -> str | None:
    """The first line that a program of Windows writes; None where it does not run."""
    where = WINDOWS_USERS if WINDOWS_USERS.is_dir() else None  # cmd.exe complains about a folder that Windows has not
    try:
        done = subprocess.run(
            command, capture_output=True, cwd=where, timeout=_TIMEOUT_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.decode("utf-8", errors="replace").split("\n")
    return lines[0].strip() or None if done.returncode == 0 else None
