"""Artifact folder to tokens, without torch. Heavy libraries are imported when an artifact is loaded, not here."""

from gemma4_export.runtime.chat_template import ChatTemplate
from gemma4_export.runtime.gemma4 import Gemma4, Reply
from gemma4_export.runtime.kv_cache import KVCache
from gemma4_export.runtime.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Gemma4", "KVCache", "Reply", "Tokenizer"]
