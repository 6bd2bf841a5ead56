"""The adapter rules of a run, from its config."""

import pytest

from adaptax.experiments import config as configs
from adaptax.experiments.registry import REGISTRIES
from adaptax.experiments.run import adapter_rules


def rules(text):
  overrides = {
    "adapter.rank": "8",
    "adapter.targets": "q",
    "adapter.rules": text,
  }
  config = configs.check(configs.load("tiny:lora"), REGISTRIES, overrides)
  return adapter_rules(config.adapter)


def test_exceptions_come_before_the_targets():
  found = rules("[('head', {'rank': 2}), ('k', {})]")
  ranks = [(path, factory.keywords["rank"]) for path, factory in found.items()]
  assert ranks == [("head", 2), ("k", 8), ("q", 8)]


@pytest.mark.parametrize(
  "text, message",
  [
    (
      "[('k', {'rnak': 2})]",
      r"rules\['k'\].rnak for 'lora': did you mean rank",
    ),
    ("[('k', {'rank': 'x'})]", r"adapter.rules\['k'\].rank: 'x' is no int"),
    (
      "('k', {'rank': 2})",
      "adapter.rules: 'k' is no pair of a path expression",
    ),
    ("[('k', {}, 2)]", r"rules: \('k', {}, 2\) is no pair"),
    ("[('k', 2)]", r"rules: \('k', 2\) is no pair"),
    ("[(2, {})]", r"rules: \(2, {}\) is no pair"),
  ],
)
def test_a_bad_rule_is_named_in_one_line(text, message):
  with pytest.raises(ValueError, match=message) as caught:
    rules(text)
  assert "\n" not in str(caught.value)
