"""What llmforge raises when the input is at fault; every message gives the value, the rule and the way out."""


class LLMForgeError(Exception):
    """Base of the errors below: `except llmforge.LLMForgeError` catches what a user can put right."""


class ConfigError(LLMForgeError, ValueError):
    """A setting that cannot work: an unknown field, a value out of range, two settings that exclude each other."""


class DataError(LLMForgeError, ValueError):
    """A text, token file or tokenizer that cannot be used."""


class CheckpointError(LLMForgeError, RuntimeError):
    """A checkpoint or model folder that is missing, damaged, or of another shape."""


class ConvertError(LLMForgeError, ValueError):
    """A model or file that cannot be expressed in the format asked for."""
