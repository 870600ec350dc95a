"""The 192 prompts of the throughput benchmark: 32 topics, 6 templates, 36 to 55 tokens each."""

from __future__ import annotations

TOPICS = (
    "photosynthesis", "the French Revolution", "bubble sort", "a haiku about rain", "black holes",
    "how to bake bread", "the water cycle", "Python decorators", "Shakespeare",
    "supply and demand", "vaccines", "electric cars", "the Great Wall of China", "recursion",
    "volcanoes", "the human heart", "blockchain", "tea ceremonies", "jazz", "machine learning",
    "polar bears", "the moon landing", "DNA", "chess openings", "yoga", "coffee",
    "the stock market", "renewable energy", "Roman roads", "the internet", "gravity", "penguins",
)  # fmt: skip
TEMPLATES = (
    "Explain {} in simple terms.",
    "Write a short paragraph about {}.",
    "Give one surprising fact about {}.",
    "What is {}? Answer in one sentence.",
    "List three key points a beginner should know about {}.",
    "Write a friendly question and answer about {} for a school quiz, "
    "then explain why the answer is right.",
)


def throughput_prompts() -> list[str]:
    """All prompts, the long-answer templates first."""
    return [
        template.format(topic)
        for templates in (TEMPLATES[:2], TEMPLATES[2:])
        for topic in TOPICS
        for template in templates
    ]


def chat_prompts(model_path: str, limit: int) -> list[list[int]]:
    """Token ids of the first `limit` prompts, each a user's message in the model's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = []
    for text in throughput_prompts()[:limit]:
        message = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
    return prompts
