"""Which files of a folder belong on the Hub, what must never leave a machine, and what is taken out of those that do.

Only files that are known to belong to a checkpoint travel by themselves. Anything else waits for ``--include``; secrets
and hidden files wait in vain.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.errors import FormatError, UnsafeError
from surgery.formats.safetensors import encode_document

KNOWN = (
    "README.md", "LICENSE*", "NOTICE*", "surgery.json", "trainable.json",
    "config.json", "generation_config.json", "adapter_config.json", "head_config.json", "quantize_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "spiece.model", "sentencepiece*.model", "*.tiktoken",
    "chat_template.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "[0-9]_*/config.json", "mergekit_config.yml",
)  # fmt: skip
"""Side files that checkpoints have."""
IGNORED = (".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store", "__pycache__")
"""What version control, caches and file managers leave: passed over without a word."""
UNDO = ".surgery"
"""Where merges keep what an unmerge needs; it travels only when asked for."""
SCANNED = (".json", ".jsonl", ".md", ".txt", ".jinja", ".yml", ".yaml", ".py", ".toml", ".cfg", ".ini")

_WEIGHTS = re.compile(
    r"(?P<stem>model|pytorch_model|adapter_model|adapter|pytorch_adapter|diffusion_pytorch_model|tf_model|flax_model)"
    r"(-\d+-of-\d+)?\.(safetensors|bin|h5|msgpack|pt)(\.index\.json)?"
)
_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}"),
    "an OpenAI key": re.compile(r"\bsk-(?:proj-)?[A-Za-z0-9_-]{40,}"),
}
_PATH = re.compile(r"(?<![\w.:/\\-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\\"'`,;:<>|]+[/\\])+(?P<last>[^\s/\\\"'`,;:<>|]+)")


def is_known(name: str) -> bool:
    """Say whether a side file belongs to a checkpoint by its name.

    >>> is_known("tokenizer.json"), is_known("1_Pooling/config.json"), is_known("notes.txt")
    (True, True, False)
    """
    return any(_matches(name, pattern) for pattern in KNOWN)


def is_included(name: str, patterns: Iterable[str]) -> bool:
    """Say whether somebody asked for a file; a hidden one must be asked for as such.

    >>> is_included("notes.txt", ["*"]), is_included(".env", ["*"])
    (True, False)
    """
    hidden = any(part.startswith(".") for part in name.split("/"))
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and not hidden


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def is_weights(name: str) -> bool:
    """Say whether a file at the top of a repository is (a part of) a model's or adapter's weights, or their index.

    >>> is_weights("model-00001-of-00003.safetensors"), is_weights("sub/model.safetensors")
    (True, False)
    """
    return _WEIGHTS.fullmatch(name) is not None


def kinds_in(names: Iterable[str]) -> set[str]:
    """Say what a repository with these files holds: ``adapter``, ``model``, ``delta``.

    >>> sorted(kinds_in(["adapter_config.json", "adapter_model.safetensors"])), sorted(kinds_in(["a.delta"]))
    (['adapter'], ['delta'])
    """
    found = set()
    for name in names:
        weights = _WEIGHTS.fullmatch(name)
        if name == "adapter_config.json":
            found.add("adapter")
        elif weights and "adapter" not in weights["stem"]:
            found.add("model")
        elif name.endswith(".delta"):
            found.add("delta")
    return found


def refuse_secrets(name: str, text: str, home: str = "") -> None:
    """Refuse a file that holds a secret or a path into somebody's home.

    Raises:
        UnsafeError: the kind of secret is named, the secret is not.
    """
    for what, pattern in _SECRETS.items():
        if pattern.search(text):
            raise UnsafeError(
                f"holds what looks like {what}", file=name, mend="take it out, and revoke it if it was real"
            )
    if len(home.strip("/")) > 1 and re.search(re.escape(home.rstrip("/")) + r"[/\\]", text):
        raise UnsafeError("holds a path of this machine", file=name, mend="take it out")


def without_paths(value: Any) -> Any:
    """Shorten every path of a file system in a JSON value to its last part.

    >>> without_paths({"recipe": "- model: /data/models/base", "tags": ["a/b"]})
    {'recipe': '- model: base', 'tags': ['a/b']}
    """
    if isinstance(value, str):
        return _PATH.sub(lambda found: found["last"], value)
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    return [without_paths(item) for item in value] if isinstance(value, list) else value


def configuration(data: bytes, name: str, changes: Mapping[str, Any]) -> bytes | None:
    """Rewrite a configuration as it should be on the Hub; ``None`` where it may stay as it is.

    Args:
        data: the file.
        name: for the error.
        changes: keys to set; those whose value is a path of this machine are dropped.

    Raises:
        FormatError: it is no JSON object.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise FormatError(f"is no JSON: {error}", file=name) from None
    if not isinstance(document, dict):
        raise FormatError("is no JSON object", file=name)
    wanted = {
        key: value for key, value in {**document, **changes}.items() if not (isinstance(value, str) and _is_path(value))
    }
    if wanted == document:
        return None
    return encode_document(wanted)


def _is_path(text: str) -> bool:
    return _PATH.fullmatch(text) is not None or text.startswith(("./", "../", "~/"))
