"""What the code may not become, read from its syntax: imports point down, no setting is dead, the README's tree is true."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up. A module imports from floors below its own, and from its own package. A new module needs a place here.
FLOORS = [
    {"latte.config", "latte.video", "latte.keyed", "latte.command"},
    {"latte.attention", "latte.ops", "latte.diffusion", "latte.optim", "latte.metrics", "latte.world", "latte.guard"},
    {"latte.model", "latte.sampler"},
    {"latte.codec", "latte.text", "latte.checkpoint", "latte.parallel", "latte.precision", "latte.lean", "latte.hardware",
     "latte.runlog"},
    {"latte.published", "latte.clips", "latte.health", "latte.memory"},
    {"latte.cached", "latte.lora"},
    {"latte.data", "latte.trace"},
    {"latte.pipeline", "latte.plan"},
    {"train", "sample", "latte.train_codec", "latte.evaluate", "latte.reproduce", "latte.app"},
]
FOR_DATA_TOOLS = {"latte.config", "latte.video", "latte.world", "latte.text", "latte.codec", "latte.clips", "latte.cached",
                  "latte.keyed", "latte.command"}


def python_files(*places):
    found = [path for place in places for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))]
    assert found
    return sorted(found)


def tree(path):
    return ast.parse(path.read_text(), str(path))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path, source=None):
    """Absolute names of all that a file imports, at its top or inside a function; `from a import b` counts as a and a.b."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source) if source is not None else tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def own_module(name):
    """latte.world.scene.Scene -> latte.world, latte.text.TextEncoder -> latte.text, numpy -> None."""
    parts = name.split(".")
    if parts[0] in ("train", "sample") and len(parts) == 1:
        return name
    if parts[0] != "latte" or len(parts) == 1:
        return None
    return f"latte.{parts[1]}"


def floor(module):
    places = [level for level, modules in enumerate(FLOORS) if module in modules]
    assert places, f"{module} stands on no floor: add it to FLOORS in {Path(__file__).name}"
    return places[0]


def misplaced(path, source=None):
    """Imports that do not point down, as text."""
    me = own_module(module_of(path))
    used = {own_module(name) for name in imports(path, source)} - {None, me}
    return [f"{module_of(path)} imports {module}" for module in sorted(used) if floor(module) >= floor(me)]


CODE = [path for path in python_files("latte", "train.py", "sample.py") if path != ROOT / "latte/__init__.py"]


@pytest.mark.parametrize("path", CODE, ids=module_of)
def test_imports_point_down(path):
    assert misplaced(path) == []


def test_the_reader_of_imports_sees_every_form():
    path = ROOT / "latte/world/scene.py"
    for line in ("from latte.model import Latte", "import latte.model", "from latte import model", "from ..model import Latte",
                 "from .. import model", "def f():\n    from latte.model import Latte"):
        assert misplaced(path, line) == ["latte.world.scene imports latte.model"], line
    assert misplaced(path, "from . import render\nfrom .render import render\nfrom latte.config import WorldConfig") == []
    assert misplaced(ROOT / "latte/sampler.py", "import latte.model") == ["latte.sampler imports latte.model"]


def test_data_tools_stand_apart():
    for path in python_files("data_tools"):
        used = {own_module(name) for name in imports(path)} - {None}
        assert used <= FOR_DATA_TOOLS, f"{module_of(path)} imports {sorted(used - FOR_DATA_TOOLS)}"
        assert not {"train", "sample"} & used
    for path in CODE:
        assert not any(name.split(".")[0] == "data_tools" for name in imports(path)), path


@pytest.mark.parametrize(("libraries", "modules"), [
    (["yaml", "omegaconf"], {"latte.config"}),
    (["diffusers"], {"latte.codec", "latte.train_codec", "latte.published", "latte.text"}),
    (["transformers"], {"latte.text"}),
    (["peft"], {"latte.lora"}),
    (["xformers", "flash_attn"], {"latte.attention"}),
    (["wandb", "tensorboard"], {"latte.runlog"}),
    (["av"], {"latte.video"}),
])
def test_one_place_knows_a_library(libraries, modules):
    for path in CODE:
        if own_module(module_of(path)) not in modules:
            used = {name.split(".")[0] for name in imports(path)} & set(libraries)
            assert not used, f"{module_of(path)} imports {used}, which only {sorted(modules)} should know"


def test_the_ground_floor_needs_no_torch():
    for name in sorted(FLOORS[0]):
        path = ROOT / (name.replace(".", "/") + ".py")
        assert not any(used.split(".")[0] == "torch" for used in imports(path)), f"{name} imports torch"


def test_only_those_above_the_components_see_the_whole_config():
    for path in CODE:
        if 0 < floor(own_module(module_of(path))) <= 2:
            assert not imports(path) & {"latte.config.Config", "latte.config.load"}, f"{module_of(path)} takes the whole config"


def settings():
    """(class, field) of every dataclass in latte/config.py, and the names under which other sections hold such a class."""
    classes = {node.name: node for node in tree(ROOT / "latte/config.py").body if isinstance(node, ast.ClassDef)}
    fields = {name: {s.target.id: ast.unparse(s.annotation) for s in node.body if isinstance(s, ast.AnnAssign)}
              for name, node in classes.items()}
    for owner in classes:
        sections = {field for held in fields.values() for field, kind in held.items() if re.search(rf"\b{owner}\b", kind)}
        for field in fields[owner]:
            one = {section.removesuffix("s") for section in sections} | {owner.removesuffix("Config").lower()}
            yield owner, field, sections | one


def reads():
    """(base, name) of every attribute that is read: `self.cfg.optim.betas` gives (optim, betas) and (cfg, optim)."""
    found = set()
    for path in [*CODE, *python_files("data_tools")]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                base = node.value
                found.add((getattr(base, "id", None) or getattr(base, "attr", None), node.attr))
    return found


def test_no_setting_is_dead():
    """Read means cfg.NAME, config.NAME, settings.NAME or SECTION.NAME; the checks in the setting's own class do not count."""
    found, read = list(settings()), reads()
    assert len(found) > 50
    dead = [f"{owner}.{field}" for owner, field, sections in found
            if not any((base, field) in read for base in {"cfg", "config", "settings"} | sections)]
    assert not dead, f"nobody reads {dead}"


def readme_paths():
    """Paths of the tree in README.md: an indented block, a path first on each line, folders ending in a slash."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"\s*pyproject\.toml\s", line))
    margin = len(lines[start]) - len(lines[start].lstrip())
    folders = []  # (indent, folder)
    for line in lines[start:]:
        indent = len(line) - len(line.lstrip()) - margin
        if not line.strip() or line.strip().startswith("```") or indent < 0:
            return
        while folders and folders[-1][0] >= indent:
            folders.pop()
        first = line.split()[0]
        if indent > (folders[-1][0] + 4 if folders else 0):
            continue  # the second line of a description
        path = "".join(folder for _, folder in folders) + first
        yield path
        if first.endswith("/"):
            folders.append((indent, first))


def test_the_tree_in_the_readme_is_true():
    named = set(readme_paths())
    assert len(named) > 15
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing, f"the README's tree names what is not there: {missing}"
    places = (ROOT / place for place in (".", "latte", "data_tools", "data_tools/repair"))
    modules = {str(path.relative_to(ROOT)) for place in places for path in place.glob("*.py")}
    unnamed = sorted(path for path in modules - named if not path.endswith("__init__.py"))
    assert not unnamed, f"the README's tree lacks {unnamed}"


def test_nothing_in_the_repository_names_a_machine():
    """Absolute paths of a home or a workplace, and hosts of package registries, belong to one machine only."""
    pattern = r"(/home/[a-z]|/root/|/opt/|pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org)"
    found = subprocess.run(["git", "grep", "-nIE", pattern, "--", ".", ":!tests/test_floors.py"], cwd=ROOT, capture_output=True,
                           text=True)
    assert found.returncode == 1, found.stdout + found.stderr
