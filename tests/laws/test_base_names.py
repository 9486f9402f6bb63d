import itertools

import pytest

from coremerge_jax.merging.base_names import best_name, is_local, same_base

pytestmark = pytest.mark.wide

ONE_MODEL = [
    [
        "Qwen/Qwen2.5-7B",
        "qwen/qwen2.5-7b/",
        "unsloth/Qwen2.5-7B-unsloth-bnb-4bit",
        "unsloth/Qwen2.5-7B-bnb-4bit",
        "https://huggingface.co/Qwen/Qwen2.5-7B",
        "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/0123abc",
        "/mnt/modelscope/hub/Qwen/Qwen2___5-7B",
        "models/Qwen2.5-7B",
        "./Qwen2.5-7B",
        "E:\\models\\Qwen2.5-7B",
    ],
    ["gpt2", "openai-community/gpt2", "/data/gpt2"],
    ["/data/model", "/data/model/"],
]


@pytest.mark.parametrize("names", ONE_MODEL, ids=lambda names: names[0])
def test_spellings_of_one_model_are_the_same(names):
    for one, other in itertools.product(names, names):
        assert same_base(one, other), (one, other)
    assert best_name(names[::-1]) in (names[0], *names[1:2])
    assert not is_local(best_name(names)) or all(map(is_local, names))


def test_other_models_are_not_the_same():
    names = ["Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-7B-Instruct", "org/Qwen2.5-7B"]
    names += ["/a/checkpoint-500", "/b/checkpoint-500", "/a/base", "/b/base", "C:\\base"]
    for one, other in itertools.combinations(names, 2):
        assert not same_base(one, other), (one, other)
