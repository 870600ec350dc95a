"""Turns the texts in `material/` and small numbers into prompts, one function for each task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MATERIAL = Path(__file__).resolve().parent / "material"


class Item(NamedTuple):
    """One prompt; `expected` is its answer where there is exactly one."""

    topic: str
    difficulty: str
    prompt: str
    expected: str | None = None


class Paragraph(NamedTuple):
    """A text of our own with questions and their answers."""

    area: str
    title: str
    text: str
    questions: list[tuple[str, str]]


def records(name: str) -> list[list[str]]:
    """The lines of a material file, each split at its bars."""
    lines = (MATERIAL / name).read_text(encoding="utf-8").splitlines()
    return [line.split(" | ") for line in lines if line and not line.startswith("#")]


def paragraphs() -> list[Paragraph]:
    """The paragraphs with their questions."""
    found = []
    for block in (MATERIAL / "paragraphs.txt").read_text(encoding="utf-8").split("\n\n"):
        head, text, *questions = [line for line in block.splitlines() if line[:2] != "# "]
        area, title = head.removeprefix("= ").split(" | ")
        pairs = [line.removeprefix("Q: ").split(" A: ") for line in questions]
        found.append(Paragraph(area, title, text, [(q, a) for q, a in pairs]))
    return found


EXPLAIN = (
    "Explain {subject}.",
    "For a child of eight, in four or five sentences, explain {subject}.",
    "In one short paragraph, explain {subject}. Use an example from daily life.",
    "A friend asks you about this at dinner: {subject}. What do you answer?",
    "Write a short entry for a school encyclopedia that explains {subject}.",
    "Explain {subject}. Begin with the most common misunderstanding.",
    "In three numbered steps, please explain {subject}.",
)


def explain() -> Iterator[Item]:
    """Explanations of everyday and scientific matters, for different listeners."""
    for index, (area, difficulty, subject) in enumerate(records("explain.txt")):
        yield Item(area, difficulty, EXPLAIN[index % len(EXPLAIN)].format(subject=subject))


REWRITE = (
    ("easy", "Rewrite this sentence so that it is shorter: {text}"),
    ("medium", "Rewrite the following in a formal and polite tone.\n\n{text}"),
    ("medium", "Say the same in plain words that a child understands.\n\nText: {text}\nRewritten:"),
    ("hard", "Rewrite this as the opening of a mystery novel: {text}"),
    ("easy", "Turn this into a question that asks for the same information: {text}"),
    ("medium", "Rewrite as a newspaper headline and one sentence below it.\n\n{text}"),
    ("medium", "Make this sound friendlier without changing the facts: {text}"),
    ("hard", "Rewrite this from the point of view of somebody who disagrees.\n\n{text}"),
)


def rewrite() -> Iterator[Item]:
    """Each sentence in two different styles, and a summary of each paragraph."""
    for index, (area, text) in enumerate(records("rewrite.txt")):
        for offset in (0, 3):
            difficulty, template = REWRITE[(index + offset) % len(REWRITE)]
            yield Item(area, difficulty, template.format(text=text))
    for index, paragraph in enumerate(paragraphs()):
        length = ("one sentence", "two sentences", "three bullet points")[index % 3]
        prompt = f"Summarise the following text in {length}.\n\n{paragraph.text}"
        yield Item(paragraph.area, "hard", prompt)


CLASSIFY = {
    "sentiment": "Is the tone of this text positive, negative or neutral? Answer with one word.",
    "topic": "Choose the section of the newspaper for this sentence: sports, economy, science, "
    "culture or weather. Give only the name of the section.",
    "urgency": "You sort messages to a support desk. Rate the urgency of the message as high, "
    "medium or low, and give the reason in one sentence.",
    "intent": "Label the message to a company as question, complaint, request or praise. "
    "Then write a suitable first sentence of a reply.",
}


def classify() -> Iterator[Item]:
    """Short texts with a label out of a small set."""
    difficulties = {"sentiment": "easy", "topic": "easy", "urgency": "medium", "intent": "medium"}
    for family, label, text in records("classify.txt"):
        prompt = f"{CLASSIFY[family]}\n\n{text}"
        yield Item(family, difficulties[family], prompt, label)


QUESTION = (
    "Read the text and answer the question.\n\n{text}\n\nQuestion: {question}\nAnswer:",
    "{text}\n\n{question} Answer in a few words.",
    "Answer from the following text only.\n\nTitle: {title}\n{text}\n\n{question}",
)


def answer() -> Iterator[Item]:
    """Questions about a given paragraph."""
    for number, paragraph in enumerate(paragraphs()):
        for index, (question, expected) in enumerate(paragraph.questions):
            template = QUESTION[(number + index) % len(QUESTION)]
            prompt = template.format(text=paragraph.text, title=paragraph.title, question=question)
            difficulty = "medium" if question.startswith(("Why", "What did")) else "easy"
            yield Item(paragraph.area, difficulty, prompt, expected)


def list_things() -> Iterator[Item]:
    """Lists, as they stand in the material."""
    for area, difficulty, request in records("list.txt"):
        yield Item(area, difficulty, request)


def dialogue() -> Iterator[Item]:
    """Conversations to be written, and the same situations to be continued."""
    for difficulty, first, second, matter, opening in records("dialogue.txt"):
        people = f"{first} and {second}" if second != "each other" else first
        topic = people.split()[1]
        write = f"Write a dialogue of about six lines between {people}. They talk about {matter}."
        if second == "each other":
            write = f"Write a dialogue of about six lines in which {people} talk about {matter}."
        yield Item(topic, difficulty, write)
        scene = f"Continue the scene. {people[0].upper()}{people[1:]} talk about {matter}."
        yield Item(topic, difficulty, f'{scene} It begins:\n\n"{opening}"')


NAMES = ("Amina", "Ben", "Chiara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas")
SURNAMES = ("Okafor", "Larsen", "Moreau", "Novak", "Silva", "Tanaka", "Weber", "Yilmaz", "Quinn")
CITIES = ("Lisbon", "Oslo", "Kyoto", "Toronto", "Nairobi", "Lyon", "Porto", "Leeds", "Cusco")
MONTHS = ("January", "March", "April", "May", "July", "August", "October", "November")
THINGS = ("lamp", "bicycle", "camera", "tent", "kettle", "printer", "violin", "desk", "globe")

# Topic, sentence, and the fields to be found in it.
EXTRACT = (
    ("visit", "On {day} {month} {name} {surname} will visit our office in {city}.", "name city"),
    (
        "order",
        "{name} {surname} ordered {count} pieces of article {code} on {day} {month}.",
        "code",
    ),
    (
        "invoice",
        "Invoice {code} over {price} euros was sent to {surname} & Co. in {city}.",
        "price",
    ),
    ("loss", "Lost near the station of {city}: a {thing}. Please call {name} at {phone}.", "phone"),
    ("sale", "For sale: {thing}, {count} years old, {price} euros, ask {name} in {city}.", "price"),
    (
        "meeting",
        "The meeting with {surname} is at {hour}:30 in room {code}, not in {city}.",
        "hour",
    ),
    ("travel", "Flight {code} from {city} lands on {day} {month} at {hour}:15.", "code hour"),
    (
        "repair",
        "{name} {surname} reports that the {thing} in room {count} is broken.",
        "thing name",
    ),
    (
        "prize",
        "{name} {surname} from {city} won {price} euros with the photo of a {thing}.",
        "city",
    ),
    ("contact", "You can reach {name} under {phone} until {hour} o'clock, from {city}.", "phone"),
)
EXTRACT_ALSO = ("name", "city", "day", "thing", "count")


def facts(index: int) -> dict[str, Any]:
    """The values that the `index`-th text to be extracted from speaks of."""
    return {
        "name": NAMES[index % len(NAMES)],
        "surname": SURNAMES[index * 2 % len(SURNAMES)],
        "city": CITIES[index * 5 % len(CITIES)],
        "month": MONTHS[index * 3 % len(MONTHS)],
        "thing": THINGS[index * 7 % len(THINGS)],
        "day": index * 11 % 28 + 1,
        "count": index * 7 % 23 + 2,
        "price": index * 37 % 460 + 25,
        "hour": index * 5 % 11 + 8,
        "code": f"{'ABCDEFGHKM'[index % 10]}{index * 53 % 900 + 100}",
        "phone": f"555-{index * 719 % 9000 + 1000}",
    }


def extract(rounds: int = 13) -> Iterator[Item]:
    """Sentences with facts to be given as JSON, as a line, or one by one."""
    for index in range(rounds * len(EXTRACT)):
        topic, template, wanted = EXTRACT[index % len(EXTRACT)]
        values = facts(index + index // len(EXTRACT))
        also = [key for key in EXTRACT_ALSO if f"{{{key}}}" in template and key not in wanted]
        keys = [*wanted.split(), *also[: 1 + index // len(EXTRACT) % 2]]
        found = {key: values[key] for key in keys}
        yield Item(topic, *_extraction(index // len(EXTRACT) % 3, template.format(**values), found))


def _extraction(form: int, text: str, found: dict[str, Any]) -> tuple[str, str, str]:
    """Difficulty, prompt and expected answer."""
    keys = ", ".join(found)
    if form == 0:
        prompt = f"Extract {keys} from the text and answer as JSON with these keys.\n\n{text}"
        return "medium", prompt, json.dumps(found)
    if form == 1:
        prompt = (
            f"Text: {text}\n\nWrite one line with these values, separated by semicolons: {keys}"
        )
        return "hard", prompt, "; ".join(str(value) for value in found.values())
    key = next(iter(found))
    prompt = f'Which {key} does this message mention? Give only the {key}.\n\n"{text}"'
    return "easy", prompt, str(found[key])


# Topic, difficulty, problem; the answer is computed from the same a, b, c.
ARITHMETIC = (
    ("sum", "easy", "What is {a} plus {b}?", lambda a, b, c: a + b),
    ("sum", "easy", "Add the numbers {a}, {b} and {c}.", lambda a, b, c: a + b + c),
    ("difference", "easy", "Take {b} away from {ab}. What is left?", lambda a, b, c: a),
    ("product", "medium", "How much is {a} times {c}?", lambda a, b, c: a * c),
    ("division", "medium", "Divide {ac} by {c}.", lambda a, b, c: a),
    (
        "shopping",
        "medium",
        "{name} buys {c} notebooks at {a} cents each. How many cents does {name} pay?",
        lambda a, b, c: a * c,
    ),
    (
        "change",
        "medium",
        "A ticket costs {a} cents. {name} pays with coins worth {ab} cents. How many cents "
        "of change are due?",
        lambda a, b, c: b,
    ),
    (
        "time",
        "medium",
        "A film of {a} minutes is followed by a talk of {b} minutes. How long is the evening "
        "if there is a break of {c} minutes in between?",
        lambda a, b, c: a + b + c,
    ),
    (
        "boxes",
        "medium",
        "{name} packs {ac} apples into boxes of {c}. How many boxes are filled?",
        lambda a, b, c: a,
    ),
    (
        "garden",
        "medium",
        "A garden is {a} metres long and {c} metres wide. What is its area in square metres?",
        lambda a, b, c: a * c,
    ),
    (
        "age",
        "hard",
        "{name} is {c} years old. {name}'s aunt is {a} years older. How old will both be "
        "together in {b} years?",
        lambda a, b, c: 2 * c + a + 2 * b,
    ),
    (
        "journey",
        "hard",
        "A train travels at {a} kilometres an hour for {c} hours and then goes {b} kilometres "
        "more. How far does it get? Show your steps.",
        lambda a, b, c: a * c + b,
    ),
    (
        "sharing",
        "hard",
        "{c} friends earn {ac} euros and share them equally. {name}, one of them, spends "
        "half of the share. How many euros does {name} keep? Think step by step.",
        lambda a, b, c: f"{a / 2:g}",
    ),
    (
        "savings",
        "medium",
        "{name} has {a} euros and saves {c} euros a week. How many euros are there after "
        "{b} weeks?",
        lambda a, b, c: a + b * c,
    ),
    ("pattern", "hard", "Continue the row by one number: {row}", lambda a, b, c: a + 4 * c),
)


def arithmetic(rounds: int = 10) -> Iterator[Item]:
    """Small calculations and word problems, with their results."""
    for index in range(rounds * len(ARITHMETIC)):
        topic, difficulty, template, result = ARITHMETIC[index % len(ARITHMETIC)]
        a, b, c = index * 17 % 83 + 12, index * 29 % 47 + 4, index * 7 % 13 + 3
        row = ", ".join(str(a + step * c) for step in range(4))
        name = NAMES[(index + index // len(ARITHMETIC)) % len(NAMES)]
        prompt = template.format(a=a, b=b, c=c, ab=a + b, ac=a * c, row=row, name=name)
        yield Item(topic, difficulty, prompt, str(result(a, b, c)))


def items_by_task() -> dict[str, list[Item]]:
    """Every prompt, by the name of its task."""
    return {
        "explain": list(explain()),
        "rewrite": list(rewrite()),
        "classify": list(classify()),
        "extract": list(extract()),
        "answer": list(answer()),
        "arithmetic": list(arithmetic()),
        "list": list(list_things()),
        "dialogue": list(dialogue()),
    }


def conversations() -> Iterator[dict[str, Any]]:
    """Conversations about a paragraph that stop where the assistant has to answer."""
    for paragraph in paragraphs():
        for first, second in zip(paragraph.questions[::2], paragraph.questions[1::2], strict=True):
            opening = f"{paragraph.text}\n\n{first[0]}"
            messages = [
                ("system", "Answer from the text that the user gives, in one short sentence."),
                ("user", opening),
                ("assistant", f"{first[1][0].upper()}{first[1][1:]}."),
                ("user", second[0]),
            ]
            yield {
                "topic": paragraph.area,
                "expected": second[1],
                "messages": [{"role": role, "content": content} for role, content in messages],
            }
