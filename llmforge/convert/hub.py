"""Models on huggingface.co: the files that a model needs, through huggingface_hub and its cache."""

from pathlib import Path

from llmforge.errors import CheckpointError

# Weights as safetensors only: a pickle could run code. Meta's and Mistral's own files repeat the weights under other names.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*", "*/*"]


def download(name: str, *, revision: str | None = None) -> Path:
    """The folder of the model `name` ("owner/name") in the cache; what is missing is downloaded.

    Honours huggingface_hub's settings: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE=1 (the cache alone).

    Raises:
        CheckpointError: no such model or revision, no access, no network and not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{name} at {revision}" if revision else name
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{what} is gated: accept its terms at https://huggingface.co/{name}, then log in with: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} on huggingface.co") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {name} here and no model {name} on huggingface.co (or it is private: hf auth login)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {name} here, and the model {what} is neither in the cache nor can it be downloaded: no network, "
            "or HF_HUB_OFFLINE is set"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"cannot download {what}: {str(error).strip().splitlines()[0]}") from error
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{what} holds no model in transformers' form: it has no config.json, and no adapter of PEFT's"
        )
    return folder
