"""Write what follows from the table in abi.py: ``python -m lbgym.sharedmemory.generate [--check]``.

That is ``lbgym/include/lbgym_shm.h``, whose functions are in ``lbgym_shm.h.in``, and the tables of
``docs/shared-memory.md``, between their markers. With ``--check`` nothing is written, and the exit code is 1 if a file
is not as it would be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..features.columns import FEATURE_NAMES, GROUND_TRUTH_NAMES
from . import abi

_PACKAGE = Path(__file__).parents[1]
TEMPLATE = Path(__file__).with_name("lbgym_shm.h.in")
HEADER_FILE = _PACKAGE / "include" / "lbgym_shm.h"
#: In a checkout only.
DOCUMENT = _PACKAGE.parents[1] / "docs" / "shared-memory.md"

_PLACEHOLDER = "@TABLES@\n"
_C_TYPES = {
    "u8": "uint8_t",
    "u16": "uint16_t",
    "u32": "uint32_t",
    "u64": "uint64_t",
    "f32": "float",
    "f64": "double",
    "char": "char",
}
_WIDTH = 120


def header() -> str:
    """The text of ``lbgym_shm.h``."""
    return _filled(TEMPLATE.read_text(), _PLACEHOLDER, _c_tables(), TEMPLATE)


def document(text: str) -> str:
    """The text of ``docs/shared-memory.md`` with the tables as they are now."""
    for name, table in _document_tables().items():
        begin, end = f"<!-- begin {name} (generated) -->\n", f"<!-- end {name} -->\n"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{DOCUMENT} must have the markers {begin!r} and {end!r} once each")
        head, rest = text.split(begin)
        text = f"{head}{begin}{table}{end}{rest.split(end)[1]}"
    return text


def _filled(text: str, placeholder: str, value: str, where: Path) -> str:
    if text.count(placeholder) != 1:
        raise ValueError(f"{where} must have {placeholder!r} once")
    return text.replace(placeholder, value)


def _wrapped(text: str) -> list[str]:
    """A C comment."""
    lines, line = [], "/*"
    for word in text.split():
        if len(line) + 1 + len(word) > _WIDTH - 3:
            lines.append(line)
            line = " *"
        line += f" {word}"
    return [*lines, f"{line} */"]


def _constants() -> list[tuple[str, str, str]]:
    """Names without their prefix, values, meanings."""
    return [
        ("MAGIC", f"UINT64_C(0x{abi.MAGIC:016X})", 'the bytes "LBGYMSHM"'),
        ("VERSION_MAJOR", str(abi.VERSION_MAJOR), ""),
        ("VERSION_MINOR", str(abi.VERSION_MINOR), ""),
        ("NUM_FRAMES", str(abi.NUM_FRAMES), "observation frames of a region made here"),
        ("NUM_ACTIONS", str(abi.NUM_ACTIONS), "actions of a region made here"),
        ("NUM_NAMES", str(abi.NUM_NAMES), "tables of names"),
        ("NAME_SIZE", str(abi.NAME_SIZE), "bytes of a server's name, the last of which is 0"),
        ("DEFAULT_CAPACITY", str(abi.DEFAULT_CAPACITY), "servers"),
        ("MAX_CAPACITY", str(abi.MAX_CAPACITY), "servers"),
        ("LINE", str(abi.LINE), "structs and sections begin on multiples of so many bytes"),
        ("STATE_RUNNING", str(abi.STATE_RUNNING), ""),
        ("STATE_CLOSED", str(abi.STATE_CLOSED), "published no more, or replaced by another region of the same name"),
        ("FLAG_GROUND_TRUTH", str(abi.FLAG_GROUND_TRUTH), "of a frame: the section ground_truth is filled"),
        ("FLAG_APPLIED", str(abi.FLAG_APPLIED), "of a frame: an action has been applied since the producer started"),
        ("FLAG_SAFE", str(abi.FLAG_SAFE), "of a frame: the safe weights are in force"),
        ("OPTION_INDEX", str(abi.OPTION_INDEX), "of a region: its data plane takes index parameters"),
        ("FLAG_INDEX", str(abi.FLAG_INDEX), "of an action: the section index is filled"),
        ("GROUND_TRUTH_BIT", str(abi.GROUND_TRUTH_BIT), "of the header's features: the first column of ground truth"),
        ("ALL_FEATURES", f"0x{_all_features():08X}", "of the header's features: all of them are measured"),
        ("AGE_UNKNOWN", "UINT64_MAX", "of ground truth"),
        ("PRODUCER_LOCK", str(abi.PRODUCER_LOCK), "byte of the file that the producer locks"),
        ("AGENT_LOCK", str(abi.AGENT_LOCK), "byte of the file that the agent locks"),
    ]


def _all_features() -> int:
    truths = len(GROUND_TRUTH_NAMES)
    return (1 << len(FEATURE_NAMES)) - 1 | ((1 << truths) - 1) << abi.GROUND_TRUTH_BIT


def _c_tables() -> str:
    lines: list[str] = []
    for name, value, doc in _constants():
        lines.append(f"#define LBGYM_SHM_{name} {value}" + (f" /* {doc} */" if doc else ""))
    lines += ["", "/* Columns of the section stats: counts and seconds. */", "enum lbgym_shm_feature {"]
    lines += [f"    LBGYM_SHM_{name.upper()} = {i}," for i, name in enumerate(FEATURE_NAMES)]
    lines += [f"    LBGYM_SHM_NUM_FEATURES = {len(FEATURE_NAMES)}", "};", ""]
    lines += ["/* Columns of the section counters: flows since the producer started. */", "enum lbgym_shm_counter {"]
    lines += [f"    LBGYM_SHM_{name.upper()} = {i}," for i, name in enumerate(abi.COUNTER_NAMES)]
    lines += [f"    LBGYM_SHM_NUM_COUNTERS = {len(abi.COUNTER_NAMES)}", "};"]
    lines += ["", f"#define LBGYM_SHM_NUM_GROUND_TRUTH {len(GROUND_TRUTH_NAMES)}", ""]
    lines += ["/* Values of the section states. */", "enum lbgym_shm_state {"]
    lines += [f"    LBGYM_SHM_{state.name} = {state.value}," for state in abi.ServerState]
    lines += ["};"]
    for struct in (abi.HEADER, abi.FRAME, abi.ACTION, abi.NAMES):
        lines += ["", *_c_struct(struct)]
    lines += [
        "",
        "/* Bytes up to the next line. */",
        "static inline uint64_t lbgym_shm_lines(uint64_t size)",
        "{",
        "    return (size + LBGYM_SHM_LINE - 1) / LBGYM_SHM_LINE * LBGYM_SHM_LINE;",
        "}",
    ]
    for struct, sections in (
        (abi.FRAME, abi.FRAME_SECTIONS),
        (abi.ACTION, abi.ACTION_SECTIONS),
        (abi.NAMES, abi.NAMES_SECTIONS),
    ):
        lines += _c_sections(struct, sections)
    lines += [
        "",
        "/* Bytes of a region made here, without index parameters. */",
        "static inline uint64_t lbgym_shm_total_size(uint32_t capacity)",
        "{",
        "    return sizeof(lbgym_shm_header) + LBGYM_SHM_NUM_FRAMES * lbgym_shm_frame_size(capacity) +",
        "           LBGYM_SHM_NUM_ACTIONS * lbgym_shm_action_index(capacity) +",
        "           LBGYM_SHM_NUM_NAMES * lbgym_shm_names_size(capacity);",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _c_struct(struct: abi.Struct) -> list[str]:
    name = f"lbgym_shm_{struct.name}"
    lines = [*_wrapped(struct.doc.replace("``", "")), f"typedef struct {name} {{"]
    declarations = []
    for field in struct.fields:
        array = f"[{field.count}]" if field.count > 1 else ""
        declarations.append(f"    {_C_TYPES[field.type]} {field.name}{array};")
    widest = max(map(len, declarations))
    for field, declaration in zip(struct.fields, declarations, strict=True):
        line = f"{declaration:{widest}} /* {field.doc} */"
        if field.name.startswith("reserved"):
            lines.append(declaration)
        elif len(line) > _WIDTH:
            lines += [f"    /* {field.doc} */", declaration]
        else:
            lines.append(line)
    lines += [f"}} {name};", f'static_assert(sizeof({name}) == {struct.size}, "size of {name}");']
    for field in struct.fields:
        if not field.name.startswith("reserved"):
            offset = struct.offset(field.name)
            lines.append(f'static_assert(offsetof({name}, {field.name}) == {offset}, "{name}.{field.name}");')
    return lines


def _c_sections(struct: abi.Struct, sections: Sequence[abi.Section]) -> list[str]:
    name = f"lbgym_shm_{struct.name}"
    article = {abi.ACTION: "an", abi.NAMES: "a table of"}.get(struct, "a")
    lines = []
    before = f"sizeof({name})"
    for section in sections:
        kind = _C_TYPES[section.type] + (f"[capacity][{section.columns}]" if section.columns > 1 else "[capacity]")
        lines += [
            "",
            *_wrapped(f"Offset of {section.name} in {article} {struct.name}, {kind}: {section.doc}."),
            f"static inline uint64_t {name}_{section.name}(uint32_t capacity)",
            "{",
            *(["    (void)capacity;"] if before.startswith("sizeof") else []),
            f"    return {before};",
            "}",
        ]
        columns = f" * {section.columns}" if section.columns > 1 else ""
        before = (
            f"{name}_{section.name}(capacity) + "
            f"lbgym_shm_lines((uint64_t)capacity{columns} * sizeof({_C_TYPES[section.type]}))"
        )
    return [
        *lines,
        "",
        f"static inline uint64_t {name}_size(uint32_t capacity)",
        "{",
        f"    return {before};",
        "}",
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("``", "`") for cell in line) + " |\n" for line in lines)


def _document_tables() -> dict[str, str]:
    constants = [
        (f"`{name}`", value.removeprefix("UINT64_C(").removesuffix(")"), doc) for name, value, doc in _constants()
    ]
    tables = {"constants": _markdown(("constant", "value", ""), constants)}
    for struct in (abi.HEADER, abi.FRAME, abi.ACTION, abi.NAMES):
        rows: list[tuple[object, ...]] = []
        at = 0
        for field in struct.fields:
            kind = field.type if field.count == 1 else f"{field.type}[{field.count}]"
            rows.append((at, kind, "" if field.name.startswith("reserved") else f"`{field.name}`", field.doc))
            at += field.size
        tables[struct.name] = _markdown(("byte", "type", "field", ""), rows)
    few, many = abi.Layout(abi.DEFAULT_CAPACITY), abi.Layout(1024)
    for name, sections, offsets, others in (
        ("frame sections", abi.FRAME_SECTIONS, few.frame_sections, many.frame_sections),
        ("action sections", abi.ACTION_SECTIONS, few.private.action_sections, many.private.action_sections),
    ):
        places: list[tuple[object, ...]] = []
        for section in sections:
            kind = f"{section.type}[{section.columns}]" if section.columns > 1 else section.type
            doc = section.doc + (f" (since 1.{section.since})" if section.since else "")
            places.append((offsets[section.name], others[section.name], kind, f"`{section.name}`", doc))
        tables[name] = _markdown(("byte, 64 servers", "byte, 1,024", "type per server", "section", ""), places)
    tables["sizes"] = _markdown(
        ("capacity", "bytes of a frame", "of an action", "of a table of names", "of the region"),
        [
            tuple(
                f"{n:,}"
                for n in (
                    layout.capacity,
                    layout.frame_size,
                    layout.action_size,
                    layout.names_size,
                    layout.total_size,
                )
            )
            for layout in (abi.Layout(1), few, many, abi.Layout(abi.MAX_CAPACITY))
        ],
    )
    return tables


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given not in ([], ["--check"]):
        sys.stderr.write("usage: python -m lbgym.sharedmemory.generate [--check]\n")
        return 2
    if not DOCUMENT.is_file():
        sys.stderr.write(f"there is no {DOCUMENT}: run this in a checkout of lbgym\n")
        return 2
    stale = False
    for path, text in ((HEADER_FILE, header()), (DOCUMENT, document(DOCUMENT.read_text()))):
        if path.is_file() and path.read_text() == text:
            continue
        stale = True
        if given:
            sys.stderr.write(f"{path} is stale: run python -m lbgym.sharedmemory.generate\n")
        else:
            path.write_text(text)
    return int(stale and bool(given))


if __name__ == "__main__":
    sys.exit(main())
