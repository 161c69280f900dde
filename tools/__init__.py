"""What an agent may call: tools with schemas, the toolbox that runs them, formats of calls."""

from tools.calls import HERMES, BadCall, CallFormat, ParsedTurn, ToolCall, get_format
from tools.tool import Tool, ToolError
from tools.toolbox import Toolbox, ToolResult

__all__ = [
    "HERMES",
    "BadCall",
    "CallFormat",
    "ParsedTurn",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "Toolbox",
    "get_format",
]
