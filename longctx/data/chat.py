"""Render conversations with the tokenizer's chat template and mark the assistant's tokens.

The template is rendered up to the end of each assistant turn; the text that a turn adds is that turn. So the template
needs no `{% generation %}` marks. Some templates show a turn otherwise once others follow it, as Qwen3's, which drops
what the assistant thought. Such a turn is context and is not marked: the model did not give it in this form.
Conversations are never cut after a system or user message: many templates refuse a system prompt by itself.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError

from longctx.data.documents import Document, Tally
from longctx.errors import UserError

DATE = datetime(2024, 7, 26)  # the one that Llama 3.2's template falls back to
# The letters of strftime but s, whose seconds depend on a time zone; "-" before one leaves out its padding.
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcCdDeFgGhHIjklmMnprRStTuUVwWxXyYzZ"]
_REPLACED = "".join(f" | replace({word!r}, {DATE.strftime(word)!r})" for word in _DIRECTIVES)
# A template's own macro comes before transformers' function of the same name, which gives the day's date. A template
# loses the line break after the macro and is otherwise as if it began there.
_FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + _REPLACED + " }}{% endmacro %}\n"


def conversation(
    document: Document, tokenizer: Any, backend: Any, tally: Tally
) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokenize one conversation: tokens uint32 [T] and mask uint8 [T] (1: an assistant token).

    Returns None and counts the document in `tally` when its content is not a usable conversation.
    """
    messages = document.content
    problem = _problem(messages)
    if problem:
        tally.broken += 1
        tally.note(document.location, problem)
        return None
    if not any(message["content"].strip() for message in messages):
        tally.empty += 1
        return None
    try:
        text, spans = rendered(messages, tokenizer)
        text.encode()
        encoding = backend.encode(text, add_special_tokens=False)
    except (TemplateError, UnicodeEncodeError) as error:  # unexpected order of roles; half a surrogate pair
        tally.broken += 1
        tally.note(document.location, error)
        return None
    if not encoding.ids:
        tally.empty += 1
        return None
    tally.rewritten += sum(message["role"] == "assistant" for message in messages) - len(spans)
    mask = np.zeros(len(encoding.ids), np.uint8)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    for low, high in spans:
        mask[(offsets[:, 0] >= low) & (offsets[:, 1] <= high) & (offsets[:, 1] > offsets[:, 0])] = 1
    return np.array(encoding.ids, np.uint32), mask


def rendered(messages: list[dict[str, str]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; returns its text and the character range of each assistant turn that it shows unchanged.

    Raises UserError when the tokenizer has no chat template or its template leaves out what the user said once others
    follow. Raises jinja2's TemplateError when the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')} has no chat template, so conversations cannot be "
            "rendered; name the tokenizer of an instruct model with model.tokenizer=FOLDER, add a chat_template to its "
            "tokenizer_config.json, or render the text yourself and read it with data=text"
        )
    text = _render(messages, tokenizer, prompt=False)
    spans: list[tuple[int, int]] = []
    for count, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        given = text if count == len(messages) else _render(messages[:count], tokenizer, prompt=False)
        if text.startswith(given):
            spans.append((_start_of_reply(messages[:count], given, tokenizer), len(given)))
        else:
            _check_whole(messages, text)
    return text, spans


def _check_whole(messages: list[dict[str, str]], text: str) -> None:
    """Raise UserError where the template shows a reply otherwise because it leaves out part of the conversation."""
    for number, message in enumerate(messages, 1):
        if message["role"] == "user" and message["content"].strip() not in text:
            raise UserError(
                f"the tokenizer's chat template leaves out message {number} of {len(messages)} once others follow, so "
                "conversations cannot be rendered as they were; use another template, or loss=all with kind=text on "
                "rendered conversations"
            )


def _start_of_reply(messages: list[dict[str, str]], text: str, tokenizer: Any) -> int:
    """Return where the last message's content begins in `text`, the rendering of all messages.

    The text is compared with the prompt that a model answers. Some templates end the prompt with more than a finished
    turn shows, such as <think>, so only what both share counts. A conversation's first message has no prompt; it is
    compared with itself with another content, since a template may put a system prompt of its own before it.
    """
    *before, last = messages
    if before:
        prompt = _render(before, tokenizer, prompt=True)
    else:
        other = "b" if last["content"].lstrip().startswith("a") else "a"
        prompt = _render([{**last, "content": other}], tokenizer, prompt=False)
    differing = (index for index, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(prompt), len(text)))


def _render(messages: list[dict[str, str]], tokenizer: Any, *, prompt: bool) -> str:
    if not messages:
        return ""
    template = _FIXED_DATE + tokenizer.get_chat_template() if writes_date(tokenizer) else None
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)


def writes_date(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template may write a date, for which `DATE` then stands."""
    return "strftime_now" in str(tokenizer.chat_template)


def _problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "no list of messages"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "a message without a role"
        if not isinstance(message.get("content"), str):
            return "a message whose content is not text"
    return None
