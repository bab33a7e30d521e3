"""HLO as text: a small program with a loop, a fusion and exchanges, as libtpu writes them."""

import pytest

from clp_jax.compilation.hlo import Module, array_shapes, balanced, shape_bytes

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[8,128]{1,0:T(8,128)(2,1)})->bf16[8,128]{1,0}}

FileNames
1 "/somewhere/else.py"
2 "/home/me/clp_jax/nn/linear.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=69 end_line=69 column=1 end_column=2}

StackFrames
1 {file_location_id=2}
2 {file_location_id=1 parent_frame_id=1}

%fused (p0: bf16[8,128]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %add.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} add(%p0, %p0), metadata={op_name="jit(f)/a (b)"}
}

%body (arg: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %arg = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %both = (s32[], bf16[8,128]{1,0}) tuple(%arg, %arg)
}

%condition (arg.1: (s32[], bf16[8,128])) -> pred[] {
  %arg.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  ROOT %less = pred[]{:T(512)} constant(true)
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %start = (s32[], bf16[8,128]{1,0}) tuple(%x, %x)
  %loop = (s32[], bf16[8,128]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  ROOT %fusion = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/add" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"4096","text":"a } in quotes"}}
}
"""


@pytest.fixture(scope="module")
def module() -> Module:
    return Module.parse(TEXT)


def test_computations_come_in_the_order_they_run(module):
    assert module.entry == "main"
    assert list(module.computations) == ["fused", "body", "condition", "main"]
    assert [line.opcode for line in module.computations["main"]] == ["parameter", "tuple", "while", "fusion"]


def test_an_instruction_has_its_operands_its_bytes_and_what_it_calls(module):
    loop, fusion = module.instructions["loop"], module.instructions["fusion"]
    assert loop.operands == ("start",)
    assert loop.called("body") == "body" and loop.called("condition") == "condition" and loop.called("calls") is None
    assert loop.bytes == 4 + 8 * 128 * 2
    assert module.operand_bytes(fusion) == fusion.bytes == 8 * 128 * 2
    assert [line.name for line in module.inside(fusion)] == ["p0", "add.1"]


def test_the_backend_says_cycles_and_iterations(module):
    assert module.trips(module.instructions["loop"]) == 12 and module.instructions["loop"].cycles is None
    assert module.instructions["fusion"].cycles == 4096


@pytest.mark.parametrize(
    ("end", "trips"),
    [
        ("ROOT %c = pred[] compare(%arg.1, %n), direction=LT", 32),
        ("ROOT %c = pred[] compare(%arg.1, %n), direction=NE", None),
        ("%c = pred[] compare(%arg.1, %n), direction=LT\n  ROOT %d = pred[] and(%c, %arg.1)", None),
    ],
)
def test_a_loop_that_only_counts_says_how_far(end, trips):
    condition = f"%n = s32[]{{:T(128)}} constant(32)\n  {end}"
    text = TEXT.replace("ROOT %less = pred[]{:T(512)} constant(true)", condition).replace("known_trip_count", "x")
    found = Module.parse(text)
    assert found.trips(found.instructions["loop"]) == trips


def test_the_source_is_the_operation_and_the_innermost_line_of_this_package(module):
    assert module.frames == {1: "nn/linear.py:69", 2: "nn/linear.py:69"}
    assert module.source(module.instructions["fusion"]) == "jit(f)/add nn/linear.py:69"
    assert module.source(module.instructions["add.1"]) == "jit(f)/a (b)"
    assert module.source(module.instructions["start"]) == ""
    other = TEXT.replace("/home/me/clp_jax/nn/linear.py", "/home/me/site-packages/optax/update.py")
    assert "optax/update.py:69" in Module.parse(other.replace("/somewhere", "/x/site-packages/jax")).frames.values()


def test_shapes_as_text():
    text = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, s4[8]{0})"
    assert array_shapes(text) == [("bf16", (2, 3)), ("u32", ()), ("s4", (8,))]
    assert shape_bytes(text) == 12 + 4 + 4


def test_brackets_in_quotes_do_not_count():
    assert balanced('x={"a": "}", "b": {"c": "\\"}"}} tail', "x=") == '{"a": "}", "b": {"c": "\\"}"}}'
    assert balanced("x=3", "x=") is None and balanced("y", "x=") is None


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module.parse("HloModule empty\n")
