//! Execution: the function is called when the first row is requested, and the needed columns are copied. From then on
//! the node holds only memory of the executor.
#![allow(unsafe_code)]

use crate::pg::fmgr::Call;
use crate::pg::list::{list_len, list_nth, new_node};
use crate::pg::{compat, datum, guard, sys};
use crate::verify::request::Function;
use crate::verify::verdict::Verdict;
use core::ptr;
use pgrx::pg_sys::{self, Datum, NodeTag, NullableDatum};

/// The largest number of arguments of our functions.
const MAX_ARGUMENTS: usize = 4;

/// PostgreSQL accesses the first field only.
#[repr(C)]
struct State {
    node: pg_sys::CustomScanState,
    function: Function,
    /// For each column of the scan's row, its column in the function's result, counted from 0.
    columns: [usize; Verdict::COLUMNS],
    /// The arguments whose values are not known at the start.
    expressions: [*mut pg_sys::ExprState; MAX_ARGUMENTS],
    /// The call's frame: the header, then the arguments.
    call: CallFrame,
    /// The scan's row, once the function was called: a rescan returns the same row and counts no second use.
    row: Option<[Option<Datum>; Verdict::COLUMNS]>,
    position: Position,
}

/// The position of the scan, whose only row may be fetched in both directions.
#[derive(Clone, Copy)]
enum Position {
    Before,
    At,
    After,
}

#[repr(C)]
struct CallFrame {
    header: pg_sys::FunctionCallInfoBaseData,
    arguments: [NullableDatum; MAX_ARGUMENTS],
}

static METHODS: Methods = Methods(pg_sys::CustomExecMethods {
    CustomName: c"Tollgate".as_ptr(),
    BeginCustomScan: Some(begin),
    ExecCustomScan: Some(next),
    EndCustomScan: Some(end),
    ReScanCustomScan: Some(rescan),
    MarkPosCustomScan: None,
    RestrPosCustomScan: None,
    EstimateDSMCustomScan: None,
    InitializeDSMCustomScan: None,
    ReInitializeDSMCustomScan: None,
    InitializeWorkerCustomScan: None,
    ShutdownCustomScan: None,
    ExplainCustomScan: None,
});

pub(super) unsafe extern "C-unwind" fn create_state<const F: usize>(
    plan: *mut pg_sys::CustomScan,
) -> *mut pg_sys::Node {
    // SAFETY: the executor passes the plan that `plan` made, and sets up the rest of a state that is zeroed.
    unsafe {
        guard::entry(|| {
            let state = new_node::<State>(NodeTag::T_CustomScanState);
            (*state).node.methods = &raw const METHODS.0;
            (*state).function = Function::ALL[F];
            ptr::write(&raw mut (*state).row, None);
            (*state).position = Position::Before;
            for (n, column) in
                (*state).columns.iter_mut().enumerate().take(list_len((*plan).custom_scan_tlist))
            {
                let entry = list_nth((*plan).custom_scan_tlist, n).cast::<pg_sys::TargetEntry>();
                let number = (*(*entry).expr.cast::<pg_sys::Var>()).varattno;
                *column = usize::try_from(number - 1).expect("columns only, as the scan's flags say");
            }
            state.cast()
        })
    }
}

unsafe extern "C-unwind" fn begin(
    node: *mut pg_sys::CustomScanState,
    estate: *mut pg_sys::EState,
    _eflags: core::ffi::c_int,
) {
    // SAFETY: the executor passes the state that `create_state` made, of the plan that `plan` made.
    unsafe {
        guard::entry(|| {
            let state = &mut *node.cast::<State>();
            let plan = state.node.ss.ps.plan.cast::<pg_sys::CustomScan>();
            let call = list_nth((*plan).custom_exprs, 0).cast::<pg_sys::FuncExpr>();
            compat::check_may_execute((*call).funcid);

            let arguments = list_len((*call).args).min(MAX_ARGUMENTS);
            state.call.header.nargs = arguments as i16;
            for n in 0..arguments {
                let argument = list_nth((*call).args, n).cast::<pg_sys::Expr>();
                match known(argument, (*estate).es_param_list_info) {
                    Some(value) => state.call.arguments[n] = value,
                    None => {
                        state.expressions[n] = pg_sys::ExecInitExpr(argument, &raw mut state.node.ss.ps);
                    }
                }
            }
        });
    }
}

/// The value of a constant or of an external parameter: creating an expression state would take longer than evaluating
/// it. The executor evaluates any other expression.
unsafe fn known(argument: *const pg_sys::Expr, parameters: pg_sys::ParamListInfo) -> Option<NullableDatum> {
    // SAFETY: an expression of the planner's; the statement's parameters, or NULL if it has none. They do not change
    // while it runs.
    unsafe {
        match (*argument).type_ {
            NodeTag::T_Const => {
                let constant = argument.cast::<pg_sys::Const>();
                Some(NullableDatum { value: (*constant).constvalue, isnull: (*constant).constisnull })
            }
            NodeTag::T_Param => {
                let parameter = argument.cast::<pg_sys::Param>();
                let all = parameters.as_ref().filter(|all| all.paramFetch.is_none())?;
                let number = usize::try_from((*parameter).paramid).ok()?.checked_sub(1)?;
                // A parameter of another type is left to the executor, which reports the error.
                let given = all.params.as_slice(usize::try_from(all.numParams).ok()?).get(number)?;
                let as_planned = (*parameter).paramkind == pg_sys::ParamKind::PARAM_EXTERN
                    && given.ptype == (*parameter).paramtype;
                as_planned.then_some(NullableDatum { value: given.value, isnull: given.isnull })
            }
            _ => None,
        }
    }
}

/// Not guarded: an ERROR that jumps over this frame leaves nothing behind.
unsafe extern "C-unwind" fn next(node: *mut pg_sys::CustomScanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the executor passes a state that has begun. ExecScan applies conditions and projection.
    unsafe { sys::ExecScan(&raw mut (*node).ss, Some(row), Some(recheck)) }
}

/// The `ExecScanAccessMtd`, like `FunctionNext`.
unsafe extern "C-unwind" fn row(node: *mut pg_sys::ScanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: ExecScan passes on the state of `next`. The slot has a value for each entry of `columns` that is set,
    // since its descriptor was made from the same list.
    unsafe {
        guard::entry(|| {
            let state = &mut *node.cast::<State>();
            let direction = (*state.node.ss.ps.state).es_direction;
            let backward = direction == pg_sys::ScanDirection::BackwardScanDirection;
            state.position = match (state.position, backward) {
                (Position::Before, false) | (Position::After, true) => Position::At,
                (_, false) => Position::After,
                (_, true) => Position::Before,
            };
            if !matches!(state.position, Position::At) {
                return ptr::null_mut();
            }
            let slot = state.node.ss.ss_ScanTupleSlot;
            let width = usize::try_from((*(*slot).tts_tupleDescriptor).natts).unwrap_or(0);
            let row = match state.row {
                Some(row) => row,
                None => {
                    let row = call(state, width);
                    *state.row.insert(row)
                }
            };
            for (n, value) in row.into_iter().enumerate().take(width) {
                *(*slot).tts_values.add(n) = value.unwrap_or(Datum::null());
                *(*slot).tts_isnull.add(n) = value.is_none();
            }
            sys::ExecStoreVirtualTuple(slot)
        })
    }
}

/// Calls the function, and copies the needed columns to memory that lives as long as the node.
unsafe fn call(state: &mut State, width: usize) -> [Option<Datum>; Verdict::COLUMNS] {
    // SAFETY: expressions that `begin` made; the frame has room for every argument. The guarded closures hold nothing
    // that needs dropping. The values are of their columns' types, and stay in place until the verdict is closed.
    unsafe {
        let previous = pg_sys::MemoryContextSwitchTo((*state.node.ss.ps.state).es_query_cxt);
        let context = state.node.ss.ps.ps_ExprContext;
        if state.expressions.iter().any(|expression| !expression.is_null()) {
            sys::guarded(|| {
                for (expression, value) in state.expressions.iter().zip(&mut state.call.arguments) {
                    if let Some(evaluate) = expression.as_ref().and_then(|state| state.evalfunc) {
                        value.value = evaluate(*expression, context, &raw mut value.isnull);
                    }
                }
            });
        }
        let verdict = Verdict::of_call(state.function, &Call::new(&raw mut state.call.header));
        let mut row = [None; Verdict::COLUMNS];
        let wanted = &state.columns[..width];
        for (value, &column) in row.iter_mut().zip(wanted) {
            *value = verdict.column(column);
        }
        sys::guarded(|| {
            for (value, &column) in row.iter_mut().zip(wanted) {
                *value = value.map(|value| datum::copy(value, Verdict::LENGTHS[column]));
            }
        });
        verdict.close();
        pg_sys::MemoryContextSwitchTo(previous);
        row
    }
}

/// Called only by EvalPlanQual, which such a node is never part of.
unsafe extern "C-unwind" fn recheck(
    _node: *mut pg_sys::ScanState,
    _slot: *mut pg_sys::TupleTableSlot,
) -> bool {
    true
}

/// Not guarded, like `next`.
unsafe extern "C-unwind" fn rescan(node: *mut pg_sys::CustomScanState) {
    // SAFETY: the executor passes a state that has begun. The arguments cannot have changed.
    unsafe {
        let state = node.cast::<State>();
        sys::ExecScanReScan(&raw mut (*state).node.ss);
        (*state).position = Position::Before;
    }
}

/// The executor frees the memory.
unsafe extern "C-unwind" fn end(_node: *mut pg_sys::CustomScanState) {}

/// PostgreSQL's table of methods holds pointers to a name and functions that never change.
struct Methods(pg_sys::CustomExecMethods);
// SAFETY: as above; it is only read.
unsafe impl Sync for Methods {}
