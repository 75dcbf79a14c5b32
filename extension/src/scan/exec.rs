//! Execution: the function is called at the first row that is asked for; its columns are handed on from where they lie.
#![allow(unsafe_code)]

use super::plan::{list_len, list_nth, new_node};
use crate::api::verify::{Function, Verdict};
use crate::compat;
use crate::fmgr::Call;
use crate::sys;
use core::ptr;
use pgrx::pg_sys::{self, Datum, NodeTag, NullableDatum};
use pgrx::prelude::*;

/// Arguments of the widest of our functions.
const MAX_ARGUMENTS: usize = 3;

/// PostgreSQL sees the beginning of it.
#[repr(C)]
struct State {
    node: pg_sys::CustomScanState,
    function: Function,
    /// For each column of the scan's row, which of the function's it is, counted from 0.
    columns: [usize; Verdict::COLUMNS],
    arguments: [*mut pg_sys::ExprState; MAX_ARGUMENTS],
    /// The call's frame: the header, then the arguments.
    call: Frame,
    /// Kept until the node ends: a scan from the beginning returns the same row and counts no second use.
    verdict: Option<Verdict>,
    returned: bool,
}

#[repr(C)]
struct Frame {
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

#[pg_guard]
pub(super) unsafe extern "C-unwind" fn create_state<const F: usize>(
    _plan: *mut pg_sys::CustomScan,
) -> *mut pg_sys::Node {
    // SAFETY: a zeroed State is one that has not begun.
    unsafe {
        let state = new_node::<State>(NodeTag::T_CustomScanState);
        ptr::write(&raw mut (*state).verdict, None);
        (*state).node.methods = &raw const METHODS.0;
        (*state).function = Function::ALL[F];
        state.cast()
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn begin(
    node: *mut pg_sys::CustomScanState,
    _estate: *mut pg_sys::EState,
    _eflags: core::ffi::c_int,
) {
    // SAFETY: the executor passes the state that `create_state` made, of the plan that `plan` made.
    unsafe {
        let state = &mut *node.cast::<State>();
        let plan = state.node.ss.ps.plan.cast::<pg_sys::CustomScan>();
        let call = list_nth((*plan).custom_exprs, 0).cast::<pg_sys::FuncExpr>();
        compat::check_may_execute((*call).funcid);

        let arguments = list_len((*call).args).min(MAX_ARGUMENTS);
        state.call.header.nargs = arguments as i16;
        for (n, argument) in state.arguments.iter_mut().enumerate().take(arguments) {
            *argument = pg_sys::ExecInitExpr(list_nth((*call).args, n).cast(), &raw mut state.node.ss.ps);
        }
        for (n, column) in state.columns.iter_mut().enumerate().take(list_len((*plan).custom_scan_tlist)) {
            let entry = list_nth((*plan).custom_scan_tlist, n).cast::<pg_sys::TargetEntry>();
            let number = (*(*entry).expr.cast::<pg_sys::Var>()).varattno;
            *column = usize::try_from(number - 1).expect("columns only, as the planner was told");
        }
    }
}

/// Not guarded: an ERROR that jumps over this frame leaves nothing behind.
unsafe extern "C-unwind" fn next(node: *mut pg_sys::CustomScanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the executor passes a state that has begun. ExecScan applies conditions and projection.
    unsafe { sys::ExecScan(&raw mut (*node).ss, Some(row), Some(recheck)) }
}

#[pg_guard]
unsafe extern "C-unwind" fn row(node: *mut pg_sys::ScanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: ExecScan passes on the state of `next`. The slot has a value for each entry of `columns` that is set, since
    // its descriptor was made from the list that they were read from; what the values point to stays in place until `end`.
    unsafe {
        let state = &mut *node.cast::<State>();
        if state.returned {
            return ptr::null_mut();
        }
        state.returned = true;
        if state.verdict.is_none() {
            state.verdict = Some(call(state));
        }
        let values = state.verdict.as_ref().map_or([None; Verdict::COLUMNS], Verdict::columns);
        let slot = state.node.ss.ss_ScanTupleSlot;
        let width = usize::try_from((*(*slot).tts_tupleDescriptor).natts).unwrap_or(0);
        for (n, &column) in state.columns.iter().enumerate().take(width) {
            *(*slot).tts_values.add(n) = values[column].unwrap_or(Datum::null());
            *(*slot).tts_isnull.add(n) = values[column].is_none();
        }
        sys::ExecStoreVirtualTuple(slot)
    }
}

/// Calls the function, in the memory that lives as long as the node.
unsafe fn call(state: &mut State) -> Verdict {
    // SAFETY: expressions that `begin` made; the frame has room for every argument there is. The guarded closure holds
    // nothing that needs dropping.
    unsafe {
        let previous = pg_sys::MemoryContextSwitchTo((*state.node.ss.ps.state).es_query_cxt);
        let context = state.node.ss.ps.ps_ExprContext;
        sys::guarded(|| {
            for (argument, value) in state.arguments.iter().zip(&mut state.call.arguments) {
                if let Some(evaluate) = argument.as_ref().and_then(|expression| expression.evalfunc) {
                    value.value = evaluate(*argument, context, &raw mut value.isnull);
                }
            }
        });
        let verdict = Verdict::of(state.function, &Call::new(&raw mut state.call.header));
        pg_sys::MemoryContextSwitchTo(previous);
        verdict
    }
}

/// Only of interest to EvalPlanQual, which such a node is never part of.
unsafe extern "C-unwind" fn recheck(
    _node: *mut pg_sys::ScanState,
    _slot: *mut pg_sys::TupleTableSlot,
) -> bool {
    true
}

#[pg_guard]
unsafe extern "C-unwind" fn rescan(node: *mut pg_sys::CustomScanState) {
    // SAFETY: the executor passes a state that has begun. The arguments cannot have changed.
    unsafe {
        let state = &mut *node.cast::<State>();
        pg_sys::ExecScanReScan(&raw mut state.node.ss);
        state.returned = false;
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn end(node: *mut pg_sys::CustomScanState) {
    // SAFETY: the executor passes a state that has begun, for the last time.
    let verdict = unsafe { (*node.cast::<State>()).verdict.take() };
    if let Some(verdict) = verdict {
        verdict.close();
    }
}

/// PostgreSQL's table of methods holds pointers, to a name and functions that never change.
struct Methods(pg_sys::CustomExecMethods);
// SAFETY: as said; it is only read.
unsafe impl Sync for Methods {}
