"""`switchworks recipes`: what there is to train, and the sizes of the papers."""

from dataclasses import dataclass

from switchworks.cli.parsing import parse_flags


@dataclass(frozen=True)
class RecipesFlags:
    """Nothing to set."""


def run(words: list[str]) -> int:
    """Print every recipe with the first line of its docstring, and every size."""
    parse_flags(RecipesFlags, "recipes", words)
    from switchworks.model import num_parameters
    from switchworks.plan import count
    from switchworks.recipes import FAMILIES, GROUPS

    for heading, recipes in GROUPS.items():
        print(f"{heading}:")
        for recipe in recipes:
            print(f"  {recipe.__name__:<20} {(recipe.__doc__ or '').partition(chr(10))[0]}")
        print()
    print("Sizes, each a recipe too: that model on C4 (mT5: on your own text):")
    for family, sizes in FAMILIES.items():
        print(f"  {family}")
        for name, model in sizes.items():
            print(f"    {name:<18} {count(num_parameters(model)):>8}")
    return 0
