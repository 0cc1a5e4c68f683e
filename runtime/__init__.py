"""Artifact folder to tokens, without torch. Heavy libraries are imported when an artifact is loaded, not here."""

from gemma4_export.runtime.chat_session import ChatSession, Dropped
from gemma4_export.runtime.chat_template import ChatTemplate
from gemma4_export.runtime.gemma4 import Gemma4
from gemma4_export.runtime.kv_cache import KVCache
from gemma4_export.runtime.reply import (
    Event,
    Finished,
    MalformedCall,
    MalformedCallPiece,
    Reply,
    ReplyParser,
    TextPiece,
    ThoughtPiece,
    Timings,
    TokenLogprob,
    ToolCallPiece,
    Usage,
    parse_reply,
)
from gemma4_export.runtime.sampling import Sampling
from gemma4_export.runtime.stream import Stream
from gemma4_export.runtime.tokenizer import Tokenizer
from gemma4_export.runtime.tool_syntax import ToolCall

__all__ = [
    "ChatSession",
    "ChatTemplate",
    "Dropped",
    "Event",
    "Finished",
    "Gemma4",
    "KVCache",
    "MalformedCall",
    "MalformedCallPiece",
    "Reply",
    "ReplyParser",
    "Sampling",
    "Stream",
    "TextPiece",
    "ThoughtPiece",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "ToolCall",
    "ToolCallPiece",
    "Usage",
    "parse_reply",
]
