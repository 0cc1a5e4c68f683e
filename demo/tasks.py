"""Text tasks with exact answers, as chat conversations: sums, tool calls, recall, small talk.

Every generator takes a ``random.Random`` and returns an ``Item``; the same seed gives the same item on every machine.
What may be asked is split by a hash of the question's content (``held_out``): one sixteenth of all questions is never
drawn in training, and the test sets draw nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

HELD_OUT_SHARE = 16  # one in so many questions is never trained on
LONGEST_OPERAND = 9  # digits


@dataclass(kw_only=True)
class Item:
    """One question: the conversation so far, and what the model should say next.

    ``key`` is the question's content for the held-out split. Exactly one of ``text`` and ``calls`` is the wanted reply;
    ``thought`` is what a model that thinks should write first.
    """

    task: str
    key: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool = False
    thought: str | None = None
    text: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)


def held_out(task: str, key: str) -> bool:
    """Whether a question belongs to the test sets."""
    return crc32(f"{task}|{key}".encode()) % HELD_OUT_SHARE == 0


def draw(make: Callable[[random.Random], Item], rng: random.Random, *, test: bool) -> Item:
    """Draw until the item lies on the wanted side of the split."""
    for _ in range(10_000):
        item = make(rng)
        if held_out(item.task, item.key) == test:
            return item
    raise ValueError(f"no {'held-out' if test else 'training'} item in 10000 draws of {make}")


# ---- sums ----------------------------------------------------------------------------------------------------------

_SUM_PHRASES = {
    "+": ("{a} + {b}", "{a} + {b} = ?", "What is {a} + {b}?", "Add {a} and {b}.", "What is {a} plus {b}?"),
    "-": ("{a} - {b}", "{a} - {b} = ?", "What is {a} - {b}?", "What is {a} minus {b}?", "Take {b} from {a}."),
    "*": ("{a} * {b}", "{a} * {b} = ?", "What is {a} * {b}?", "Multiply {a} by {b}.", "What is {a} times {b}?"),
}


def working(a: int, b: int, operation: str) -> str:
    """The written-out thought: one line per digit from the right, each with the result so far.

    For 4827+915 the lines are ``1:7+5+0=12 2``, ``2:2+1+1=04 42``, …: place, the two digits and the carry, what they
    make, and the result's digits so far. Subtraction borrows: ``1:12-5-0=7 7`` (the 1 before the 2 was borrowed).
    """
    left, right = str(a)[::-1], str(b)[::-1]
    lines = [f"{a}{operation}{b}"]
    carry, done = 0, ""
    for place, digit in enumerate(left):
        last = place == len(left) - 1
        x = int(digit)
        y = b if operation == "*" else int(right[place]) if place < len(right) else 0
        if operation == "-":
            borrow = 1 if x - y - carry < 0 else 0
            value = 10 * borrow + x - y - carry
            done = f"{value}{done}"
            lines.append(f"{place + 1}:{borrow}{x}-{y}-{carry}={value} {done}")
            carry = borrow
        else:
            value = x * y + carry if operation == "*" else x + y + carry
            carry_in, carry = carry, value // 10
            done = f"{value}{done}" if last and carry else f"{value % 10}{done}"
            lines.append(f"{place + 1}:{x}{operation}{y}+{carry_in}={value:02d} {done}")
    return "\n".join(lines)


def _operand(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def make_sum(rng: random.Random, *, thinking: bool, shortest: int = 1, longest: int = LONGEST_OPERAND) -> Item:
    """A sum, difference or product with one digit, with ``shortest`` to ``longest`` digits in the first operand."""
    operation = rng.choice("++--*")
    digits = rng.randint(shortest, longest)
    a = _operand(rng, digits)
    if operation == "*":
        b = rng.randint(0, 9)
    else:
        b = _operand(rng, rng.randint(max(1, digits - rng.choice((0, 0, 1, 3))), digits))
        a, b = max(a, b), min(a, b)
    answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
    question = rng.choice(_SUM_PHRASES[operation]).format(a=a, b=b)
    messages = [*_opening(rng), {"role": "user", "content": question}]
    return Item(
        task="sum_thinking" if thinking else "sum_direct",
        key=f"{a}{operation}{b}",
        messages=messages,
        enable_thinking=thinking,
        thought=working(a, b, operation) if thinking else None,
        text=str(answer),
    )


# ---- small talk ----------------------------------------------------------------------------------------------------

_ABOUT = "I am a tiny Gemma 4 model, made for a demo."
_ABLE = "I do sums, call tools, remember what you tell me and read digits in pictures."
_SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hello", "Hi!", "Hi", "Hey there", "Good day!"), "Hello! How can I help you?"),
    (("Good morning!", "Good morning"), "Good morning! How can I help you?"),
    (("Good evening!", "Good evening"), "Good evening! How can I help you?"),
    (("Who are you?", "What are you?", "Tell me about yourself."), _ABOUT),
    (("What can you do?", "How can you help me?", "What are you good at?"), _ABLE),
    (("How are you?", "How are you today?"), "I am fine, thank you. And you?"),
    (("Thanks!", "Thank you!", "Thank you very much."), "You are welcome!"),
    (("Bye!", "Goodbye!", "See you later."), "Goodbye! See you soon."),
    (("Are you a human?", "Are you a person?"), "No, I am a very small language model."),
    (("Do you like music?", "Do you like numbers?"), "I like numbers most of all."),
    (("How big are you?", "How many weights do you have?"), "I have about six million weights."),
    (("Can you read pictures?", "Can you see?"), "Yes, show me a picture with digits."),
    (("Can you count?", "Are you good at sums?"), "Yes, I am good at sums when I think."),
    (("That is great.", "Very good.", "Well done!"), "Thank you!"),
    (("I am tired.", "I am bored."), "Then let us do a nice little sum."),
    (("Ok.", "I see.", "All right."), "Good. What else can I do?"),
)
_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a tiny demo model.",
    "Be brief.",
    "Answer with the result only.",
    "You are good at sums.",
)


def _small_talk(rng: random.Random) -> tuple[str, str]:
    questions, answer = rng.choice(_SMALL_TALK)
    return rng.choice(questions), answer


def _opening(rng: random.Random) -> list[dict[str, Any]]:
    """Now and then a system turn, now and then some small talk before the question."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(_SYSTEMS)})
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
        question, answer = _small_talk(rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def make_small_talk(rng: random.Random) -> Item:
    """A greeting or a question about the model itself; with thinking on, the thought is one short line."""
    opening = _opening(rng)
    question, answer = _small_talk(rng)
    thinking = rng.random() < 0.3
    tools = [tool["declaration"] for tool in rng.sample(TOOLS, rng.randint(1, 2))] if rng.random() < 0.3 else None
    return Item(
        task="small_talk",
        key=f"{rng.getrandbits(32)}",
        messages=[*opening, {"role": "user", "content": question}],
        tools=tools,
        enable_thinking=thinking,
        thought="This needs no working." if thinking else None,
        text=answer,
    )


# ---- recall --------------------------------------------------------------------------------------------------------

NAMES = (
    "Ana Ben Clara David Emma Felix Grace Hugo Ida Jonas Kira Leo Maria Nora Oscar Paul Rosa Sam Tara Victor".split()
)
CITIES = (
    "Paris London Rome Berlin Madrid Vienna Oslo Lisbon Athens Dublin Prague Warsaw Cairo Tokyo Lima Boston".split()
)
_COLORS = "red green blue yellow black white orange purple brown silver".split()
_ANIMALS = "cat dog horse rabbit parrot hamster turtle goat".split()
_FOODS = "bread soup rice pasta cheese apples honey chocolate".split()
# what is said, what the model answers, what is asked later
_FACTS: tuple[tuple[str, str, tuple[str, ...], Callable[[random.Random], str]], ...] = (
    ("My name is {v}.", "Nice to meet you, {v}.", ("What is my name?", "Who am I?"), lambda r: r.choice(NAMES)),
    (
        "I live in {v}.",
        "I will remember that.",
        ("Where do I live?", "Which city do I live in?"),
        lambda r: r.choice(CITIES),
    ),
    (
        "My code is {v}.",
        "I will remember it.",
        ("What is my code?", "Tell me my code."),
        lambda r: f"{r.randint(0, 9999):04d}",
    ),
    ("My favorite color is {v}.", "A nice color.", ("What is my favorite color?",), lambda r: r.choice(_COLORS)),
    ("I have a {v}.", "How nice.", ("Which animal do I have?", "What animal do I have?"), lambda r: r.choice(_ANIMALS)),
    ("I like to eat {v}.", "That sounds good.", ("What do I like to eat?",), lambda r: r.choice(_FOODS)),
    (
        "My room number is {v}.",
        "I will remember that.",
        ("What is my room number?",),
        lambda r: str(r.randint(100, 999)),
    ),
)
_SYSTEM_FACTS = ("The user is called {v}.", "What is my name?")


def _filler(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return _small_talk(rng)
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return rng.choice(_SUM_PHRASES["+"]).format(a=a, b=b), str(a + b)


def make_recall(rng: random.Random, *, fillers: tuple[int, int] = (1, 5)) -> Item:
    """One or two facts, then other talk for longer than the sliding window, then a question about one of the facts."""
    facts = [(fact, fact[3](rng)) for fact in rng.sample(_FACTS, rng.choice((1, 2, 2, 3)))]
    messages: list[dict[str, Any]] = []
    system_name = None
    if rng.random() < 0.2 and all(fact is not _FACTS[0] for fact, _ in facts):
        system_name = rng.choice(NAMES)
        messages.append({"role": "system", "content": _SYSTEM_FACTS[0].format(v=system_name)})
    elif rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(_SYSTEMS)})
    for (said, reply, _, _), value in facts:
        messages.append({"role": "user", "content": said.format(v=value)})
        messages.append({"role": "assistant", "content": reply.format(v=value)})
    for _ in range(rng.randint(*fillers)):
        question, answer = _filler(rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system_name and rng.random() < 0.6:
        question, value, said = _SYSTEM_FACTS[1], system_name, _SYSTEM_FACTS[0]
    else:
        (said, _, questions, _), value = rng.choice(facts)
        question = rng.choice(questions)
    messages.append({"role": "user", "content": question})
    thinking = rng.random() < 0.25
    values = "/".join(value for _, value in facts)
    return Item(
        task="recall",
        key=f"{question}{value}|{values}|{len(messages)}",
        messages=messages,
        enable_thinking=thinking,
        thought=f"I was told: {said.format(v=value)}" if thinking else None,
        text=value,
    )


# ---- tools ---------------------------------------------------------------------------------------------------------


def _tool(name: str, description: str, parameters: dict[str, tuple[str, str]], **rest: Any) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    declaration = {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
    return {"name": name, "declaration": declaration, **rest}


_ROOMS = "kitchen bedroom hall garden".split()
_DEVICES = "lamp heater radio fan".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_EVENTS = ("lunch", "dinner", "yoga", "football", "a meeting", "a party", "the dentist", "school")
_TEXTS = ("I am late", "I am home", "the train is late", "dinner is ready", "I miss you", "call me", "all is well")
_SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy")
_ITEMS = "book chair table clock bottle ticket jacket bicycle".split()
_UNITS = (("miles", "km"), ("pounds", "kg"), ("feet", "meters"), ("hours", "minutes"))

# arguments, phrases, the tool's result, and the reply that uses it; {…} refers to arguments and to {result}
TOOLS: tuple[dict[str, Any], ...] = (
    _tool(
        "get_weather", "Weather in a city.", {"city": ("string", "Name of the city.")},
        draw=lambda r: {"city": r.choice(CITIES)},
        phrases=("What is the weather in {city}?", "How is the weather in {city} today?", "Is it warm in {city}?"),
        result=lambda r: f"{r.choice(_SKIES)}, {r.randint(0, 38)} degrees",
        reply="In {city} it is {result}.",
    ),
    _tool(
        "get_time", "Time in a city.", {"city": ("string", "Name of the city.")},
        draw=lambda r: {"city": r.choice(CITIES)},
        phrases=("What time is it in {city}?", "Tell me the time in {city}."),
        result=lambda r: f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}",
        reply="It is {result} in {city}.",
    ),
    _tool(
        "set_timer", "Start a timer.", {"minutes": ("integer", "How long.")},
        draw=lambda r: {"minutes": r.randint(1, 99)},
        phrases=("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."),
        result=lambda r: r.choice(("ok", "started")),
        reply="The timer is set for {minutes} minutes.",
    ),
    _tool(
        "send_message", "Send a message.",
        {"text": ("string", "What to say."), "to": ("string", "Name of the person.")},
        draw=lambda r: {"text": r.choice(_TEXTS), "to": r.choice(NAMES)},
        phrases=("Tell {to} that {text}.", "Send {to} the message: {text}.", "Write to {to}: {text}."),
        result=lambda r: r.choice(("sent", "ok")),
        reply="I sent your message to {to}.",
    ),
    _tool(
        "add_event", "Put an event in the calendar.",
        {"day": ("string", "Day of the week."), "title": ("string", "Name of the event.")},
        draw=lambda r: {"day": r.choice(_DAYS), "title": r.choice(_EVENTS)},
        phrases=("Put {title} on {day}.", "I have {title} on {day}, note it.", "Add {title} on {day}."),
        result=lambda r: r.choice(("added", "ok")),
        reply="I noted {title} on {day}.",
    ),
    _tool(
        "convert", "Convert an amount to another unit.",
        {
            "amount": ("number", "How much."),
            "source": ("string", "Unit to convert."),
            "target": ("string", "Unit wanted."),
        },
        draw=lambda r: dict(zip(("amount", "source", "target"), (r.randint(1, 999), *r.choice(_UNITS)), strict=True)),
        phrases=("Convert {amount} {source} to {target}.", "How many {target} are {amount} {source}?"),
        result=lambda r: f"{r.randint(1, 999)}.{r.randint(0, 9)}",
        reply="{amount} {source} are {result} {target}.",
    ),
    _tool(
        "find_phone", "Phone number of a person.", {"name": ("string", "Name of the person.")},
        draw=lambda r: {"name": r.choice(NAMES)},
        phrases=("What is the phone number of {name}?", "I want to call {name}, what is the number?"),
        result=lambda r: f"555 {r.randint(0, 9999):04d}",
        reply="The number of {name} is {result}.",
    ),
    _tool(
        "switch", "Switch a device.",
        {"device": ("string", "Which one."), "on": ("boolean", "On or off."), "room": ("string", "Where it is.")},
        draw=lambda r: {"device": r.choice(_DEVICES), "on": r.random() < 0.5, "room": r.choice(_ROOMS)},
        phrases=("Switch {on} the {device} in the {room}.", "Turn {on} the {room} {device}."),
        result=lambda r: r.choice(("ok", "done")),
        reply="The {device} in the {room} is {on} now.",
    ),
    _tool(
        "get_price", "Price of a thing.", {"item": ("string", "What to buy.")},
        draw=lambda r: {"item": r.choice(_ITEMS)},
        phrases=("How much is a {item}?", "What does a {item} cost?"),
        result=lambda r: f"{r.randint(1, 199)}.{r.randint(0, 99):02d}",
        reply="A {item} costs {result} euro.",
    ),
)  # fmt: skip


def _spoken(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: ("on" if value else "off") if isinstance(value, bool) else value for key, value in arguments.items()}


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _tool_question(rng: random.Random) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """A tool, the arguments of one call or of two, and the question."""
    tool = rng.choice(TOOLS)
    rounds = [tool["draw"](rng)]
    question = rng.choice(tool["phrases"])
    if "{city}" in question and rng.random() < 0.2:
        other = rng.choice([city for city in CITIES if city != rounds[0]["city"]])
        rounds.append({"city": other})
        question = question.replace("{city}", f"{{city}} and {other}")
    return tool, rounds, question.format(**_spoken(rounds[0]))


def make_tool_call(rng: random.Random) -> Item:
    """A question that one of the offered tools answers: the reply is the call, or two calls for two cities."""
    opening = _opening(rng)
    tool, rounds, question = _tool_question(rng)
    offered = [tool, *rng.sample([other for other in TOOLS if other is not tool], rng.choice((0, 1, 1, 2)))]
    rng.shuffle(offered)
    thinking = rng.random() < 0.3
    return Item(
        task="tool_call",
        key=f"{question}",
        messages=[*opening, {"role": "user", "content": question}],
        tools=[other["declaration"] for other in offered],
        enable_thinking=thinking,
        thought=f"I need {tool['name']}." if thinking else None,
        calls=[_call(tool["name"], arguments) for arguments in rounds],
    )


def make_tool_answer(rng: random.Random) -> Item:
    """The same conversation after the tool has answered: the reply uses the result."""
    item = make_tool_call(rng)
    tool = next(tool for tool in TOOLS if tool["name"] == item.calls[0]["function"]["name"])
    calls, results, replies = [], [], []
    for index, call in enumerate(item.calls):
        result = tool["result"](rng)
        calls.append({"id": f"call_{index}", **call})
        results.append({"role": "tool", "tool_call_id": f"call_{index}", "name": tool["name"], "content": result})
        replies.append(tool["reply"].format(result=result, **_spoken(call["function"]["arguments"])))
    return Item(
        task="tool_answer",
        key="|".join([item.key, *(str(result["content"]) for result in results)]),
        messages=[*item.messages, {"role": "assistant", "content": "", "tool_calls": calls}, *results],
        tools=item.tools,
        enable_thinking=item.enable_thinking,
        thought="The tool has answered." if item.enable_thinking else None,
        text=" ".join(replies),
    )


# ---- the mixture ---------------------------------------------------------------------------------------------------

Mixture = tuple[tuple[float, Callable[[random.Random], Item]], ...]
MIXTURE: Mixture = (
    (0.46, lambda rng: make_sum(rng, thinking=True)),
    (0.05, lambda rng: make_sum(rng, thinking=False)),
    (0.13, make_tool_call),
    (0.09, make_tool_answer),
    (0.19, make_recall),
    (0.08, make_small_talk),
)


def draw_training_item(rng: random.Random, mixture: Mixture = MIXTURE) -> Item:
    """One item of a mixture, never a held-out one."""
    weights = [weight for weight, _ in mixture]
    make = rng.choices([make for _, make in mixture], weights)[0]
    return draw(make, rng, test=False)
