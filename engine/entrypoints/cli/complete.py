"""`fastdeploy complete`: continuations of texts by the model of a running server."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from .dialogue import Piece, client_of, converse, dialogue_parser


def main(words: Sequence[str]) -> int:
    options = dialogue_parser("complete", "Continues texts with the model of a running server.").parse_args(
        words
    )
    client, model = client_of(options)

    def answer(text: str) -> Generator[Piece]:
        fields = {"model": model, "prompt": text, "max_tokens": options.max_tokens}
        for event in client.stream("/completions", fields):
            for choice in event.choices:
                yield Piece(choice.text)

    return converse(options, answer, f"Texts for {model}. Ctrl-C stops an answer, Ctrl-D ends.")
