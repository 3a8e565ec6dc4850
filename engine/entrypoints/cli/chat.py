"""`fastdeploy chat`: a conversation with the model of a running server."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from .dialogue import Piece, client_of, converse, dialogue_parser


def main(words: Sequence[str]) -> int:
    parser = dialogue_parser("chat", "Chats with the model of a running server.")
    parser.add_argument("--system-prompt", metavar="TEXT", help="instructions for the model")
    options = parser.parse_args(words)
    client, model = client_of(options)
    messages: list[dict[str, Any]] = []
    if options.system_prompt is not None:
        messages.append({"role": "system", "content": options.system_prompt})

    def answer(text: str) -> Generator[Piece]:
        messages.append({"role": "user", "content": text})
        reply = {"role": "assistant", "content": ""}
        try:
            fields = {"model": model, "messages": messages, "max_tokens": options.max_tokens}
            for event in client.stream("/chat/completions", fields):
                for choice in event.choices:
                    yield Piece(choice.delta.reasoning_content or "", is_reasoning=True)
                    yield Piece(choice.delta.content or "")
                    reply["content"] += choice.delta.content or ""
        finally:
            # A stopped answer stays in the conversation; after an error the question may be asked again.
            if reply["content"]:
                messages.append(reply)
            else:
                messages.pop()

    return converse(options, answer, f"Chat with {model}. Ctrl-C stops an answer, Ctrl-D ends.")
