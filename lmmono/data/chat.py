"""Chat messages as the text that a model was trained on: its tokenizer's own template."""

from typing import TYPE_CHECKING, Any

from lmmono.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
else:  # for annotations only: reading tasks for `lmmono check` needs no transformers
    PreTrainedTokenizerFast = object


class Chat:
    """A column of chat messages and the template that makes text of them.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(self, column: str, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"data.chat: the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat "
                "template; take the tokenizer of a chat model, or render the messages to a column "
                "of text"
            )
        self.column = column
        self._tokenizer = tokenizer

    def text(self, messages: Any, where: str) -> str:
        """Return messages as text, special tokens spelled out; None is no message.

        Raises:
            DataError: They are no list of roles and contents, or the template refuses them.
        """
        if messages is None or messages == []:
            return ""
        is_list = isinstance(messages, list)
        if not is_list or not all(isinstance(m, dict) and "role" in m for m in messages):  # pyright: ignore[reportUnknownVariableType]
            raise DataError(
                f"{where}: want a list of messages with role and content in {self.column!r}, got "
                f"{messages!r:.60}"
            )
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program, and raises what it likes
            reason = str(error).partition("\n")[0]
            raise DataError(f"{where}: the chat template refuses the messages: {reason}") from error
