//! A policy on a constant scope is asked once for a statement, not for each row.
//!
//! `USING (tollgate.token_has_scope('posts:read'))` has the same answer for every row of a statement. Outside of a policy
//! PostgreSQL sees that and makes it a one-time filter; the condition of a policy it keeps at the scan, lest another
//! condition be asked before it, and there it is evaluated, or the result of a sub-select looked at, row by row. For a
//! `count(*)` that is a quarter of the work.
//!
//! So when a statement starts and there is an identity, such conditions are answered first: while the executor sets itself
//! up, those that are true are not in the plan, and those that are false are a constant. Then the plan is as it was, since
//! it may be a cached one. The answers are those of the identity with which the statement began, as a STABLE function's may
//! be; without an identity nothing is answered ahead.
#![allow(unsafe_code)]

use crate::scan::{list_len, list_nth};
use crate::{compat, context, sys};
use core::cell::RefCell;
use core::ffi::c_int;
use pgrx::pg_sys::{self, Datum, List, Node, NodeTag, Plan};
use pgrx::prelude::*;
use std::sync::OnceLock;

static NEXT_HOOK: OnceLock<pg_sys::ExecutorStart_hook_type> = OnceLock::new();

pub(crate) fn init() {
    // SAFETY: called once per process, while it loads libraries; whoever had set the hook before is called by ours.
    unsafe {
        let _ = NEXT_HOOK.set(pg_sys::ExecutorStart_hook);
        pg_sys::ExecutorStart_hook = Some(executor_start);
    }
}

/// Not guarded: what `next` raises may jump over this frame, and nothing here panics.
unsafe extern "C-unwind" fn executor_start(query: *mut pg_sys::QueryDesc, flags: c_int) {
    let explains_only = flags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY.cast_signed() != 0;
    let settles = !explains_only && context::is_established();
    // SAFETY: the executor passes a valid descriptor, to whoever comes after us as to us.
    unsafe {
        if settles || SETTLED.with_borrow(|settled| !settled.is_empty()) {
            start_settled(query, flags, settles);
        } else {
            next()(query, flags);
        }
    }
}

fn next() -> unsafe extern "C-unwind" fn(*mut pg_sys::QueryDesc, c_int) {
    NEXT_HOOK.get().copied().flatten().unwrap_or(sys::standard_ExecutorStart)
}

#[pg_guard]
unsafe extern "C-unwind" fn start_settled(query: *mut pg_sys::QueryDesc, flags: c_int, settles: bool) {
    // SAFETY: as for `executor_start`; an ERROR unwinds through `Starting`.
    unsafe {
        let _starting = Starting::new((*query).plannedstmt, settles);
        sys::guarded(|| next()(query, flags));
    }
}

/// A plan's conditions, and those of them that are not settled.
struct Settled {
    plan: *mut Plan,
    conditions: *mut List,
    left: *mut List,
}

thread_local! {
    /// In the plan of the statement that is starting.
    static SETTLED: RefCell<Vec<Settled>> = const { RefCell::new(Vec::new()) };
}

/// While a statement starts its conditions are settled, and those of the statements around it, which are starting too, are
/// in their plans: a function that partitions are pruned by may execute the same cached plan, as somebody else.
struct Starting {
    around: Vec<Settled>,
}

impl Starting {
    unsafe fn new(statement: *mut pg_sys::PlannedStmt, settles: bool) -> Self {
        let starting = Starting { around: SETTLED.take() };
        // SAFETY: a valid statement, which nobody else uses while it is about to be executed; plans outlive the start of their
        // execution.
        unsafe {
            for settled in &starting.around {
                (*settled.plan).qual = settled.conditions;
            }
            if settles {
                settle_tree((*statement).planTree);
                settle_list((*statement).subplans);
            }
        }
        starting
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        // SAFETY: plans outlive the start of their execution.
        unsafe {
            for settled in SETTLED.take() {
                (*settled.plan).qual = settled.conditions;
            }
            for settled in &self.around {
                (*settled.plan).qual = settled.left;
            }
        }
        SETTLED.set(core::mem::take(&mut self.around));
    }
}

unsafe fn settle_list(plans: *mut List) {
    // SAFETY: a list of plans, some of which may be NULL.
    unsafe {
        for n in 0..list_len(plans) {
            settle_tree(list_nth(plans, n).cast());
        }
    }
}

unsafe fn settle_tree(plan: *mut Plan) {
    // SAFETY: valid nodes, of the types that their tags say, or NULL.
    unsafe {
        let Some(tag) = plan.cast::<Node>().as_ref().map(|node| node.type_) else { return };
        pg_sys::check_stack_depth();
        settle(plan);
        settle_tree((*plan).lefttree);
        settle_tree((*plan).righttree);
        match tag {
            NodeTag::T_Append => settle_list((*plan.cast::<pg_sys::Append>()).appendplans),
            NodeTag::T_MergeAppend => settle_list((*plan.cast::<pg_sys::MergeAppend>()).mergeplans),
            NodeTag::T_SubqueryScan => settle_tree((*plan.cast::<pg_sys::SubqueryScan>()).subplan),
            _ => {}
        }
    }
}

unsafe fn settle(plan: *mut Plan) {
    // SAFETY: a valid plan, whose `qual` is a list of conditions that all must be true.
    unsafe {
        let conditions = (*plan).qual;
        let answers: Vec<Option<bool>> =
            (0..list_len(conditions)).map(|n| answer(list_nth(conditions, n).cast())).collect();
        if answers.iter().all(Option::is_none) {
            return;
        }
        let mut left = core::ptr::null_mut();
        for (n, answer) in answers.into_iter().enumerate() {
            left = match answer {
                Some(true) => left,
                Some(false) => pg_sys::lappend(left, pg_sys::makeBoolConst(false, false).cast()),
                None => pg_sys::lappend(left, list_nth(conditions, n)),
            };
        }
        SETTLED.with_borrow_mut(|settled| settled.push(Settled { plan, conditions, left }));
        (*plan).qual = left;
    }
}

unsafe extern "C-unwind" {
    // Entered as SQL enters them: `api::context`.
    fn context_has_scope(call: pg_sys::FunctionCallInfo) -> Datum;
    fn context_has_any_scope(call: pg_sys::FunctionCallInfo) -> Datum;
    fn context_has_all_scopes(call: pg_sys::FunctionCallInfo) -> Datum;
}

/// The answer to a condition that asks one of our functions about nothing but a constant.
unsafe fn answer(condition: *mut Node) -> Option<bool> {
    // SAFETY: a valid expression, whose nodes are of the types that their tags say; the function is one of ours, called
    // with what it is declared for.
    unsafe {
        if (*condition).type_ != NodeTag::T_FuncExpr {
            return None;
        }
        let call = condition.cast::<pg_sys::FuncExpr>();
        if list_len((*call).args) != 1 || (*call).funcresulttype != pg_sys::BOOLOID {
            return None;
        }
        let argument = list_nth((*call).args, 0).cast::<pg_sys::Const>();
        if (*argument).xpr.type_ != NodeTag::T_Const || (*argument).constisnull {
            return None;
        }
        let mut function = pg_sys::FmgrInfo::default();
        pg_sys::fmgr_info((*call).funcid, &raw mut function);
        let entry = function.fn_addr? as usize;
        let ours: [unsafe extern "C-unwind" fn(pg_sys::FunctionCallInfo) -> Datum; 3] =
            [context_has_scope, context_has_any_scope, context_has_all_scopes];
        if !ours.iter().any(|&one| one as usize == entry) {
            return None;
        }
        compat::check_may_execute((*call).funcid);
        let answer =
            pg_sys::FunctionCall1Coll(&raw mut function, (*call).inputcollid, (*argument).constvalue);
        Some(answer.value() != 0)
    }
}
