"""An item of a task as an Engine reads it."""

from __future__ import annotations

from qaflora_edge.engine import Engine
from qaflora_edge.errors import ChatTemplateError
from qaflora_edge.evaluation.tasks import Item, Task


def task_prompt(engine: Engine, task: Task, item: Item, *, raw_prompt: bool = False) -> list[int]:
    """Token ids of what an item asks: in chat form where there is a template, or as it is.

    raw_prompt  no chat template, whatever the task says

    Raises PromptError for one that is too long, ChatTemplateError for a conversation without a
    template.
    """
    if not (raw_prompt or task.raw_prompt) and engine.has_chat_template:
        return engine.chat_tokens(task.messages(item))
    if "messages" in item.fields or task.system is not None:
        raise ChatTemplateError(
            f"Cannot ask {item.where}: messages and system need a chat template, and there is "
            "none, or raw_prompt leaves it out. Write the prompt as one text."
        )
    return engine.tokenize(task.question(item))
