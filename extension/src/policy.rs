//! A policy on a constant scope is asked once for a statement, not for each row.
//!
//! `USING (tollgate.token_has_scope('posts:read'))` has the same answer for every row of a statement. Outside of a policy
//! PostgreSQL sees that and makes it a one-time filter; the condition of a policy it keeps at the scan, lest another
//! condition be asked before it, and there it is evaluated, or the result of a sub-select looked at, row by row. For a
//! `count(*)` that is a quarter of the work.
//!
//! So when a statement starts and there is an identity, such conditions are answered first: while the executor sets itself
//! up, those that are true are not in the plan, and those that are false are a constant. Then the plan is as it was, since
//! it may be a cached one. A statement sees the identity with which it began, as a STABLE function may.
#![allow(unsafe_code)]

use crate::scan::{list_len, list_nth};
use crate::{compat, context, sys};
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

#[pg_guard]
unsafe extern "C-unwind" fn executor_start(query: *mut pg_sys::QueryDesc, flags: c_int) {
    let next = NEXT_HOOK.get().copied().flatten().unwrap_or(sys::standard_ExecutorStart);
    let explains_only = flags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY.cast_signed() != 0;
    // SAFETY: the executor passes a valid descriptor, to whoever comes after us as to us. Without an identity nothing here
    // needs dropping; with one, what `next` raises unwinds through `Settled`.
    unsafe {
        if explains_only || !context::is_established() {
            return next(query, flags);
        }
        let _settled = Settled::new((*query).plannedstmt);
        sys::guarded(|| next(query, flags));
    }
}

/// A plan without the conditions whose answer is known; dropped, it is what it was.
struct Settled(Vec<(*mut Plan, *mut List)>);

impl Settled {
    unsafe fn new(statement: *mut pg_sys::PlannedStmt) -> Self {
        let mut settled = Settled(Vec::new());
        // SAFETY: a valid statement, which nobody else uses while it is about to be executed.
        unsafe {
            settled.settle_tree((*statement).planTree);
            settled.settle_list((*statement).subplans);
        }
        settled
    }

    unsafe fn settle_list(&mut self, plans: *mut List) {
        // SAFETY: a list of plans, some of which may be NULL.
        unsafe {
            for n in 0..list_len(plans) {
                self.settle_tree(list_nth(plans, n).cast());
            }
        }
    }

    unsafe fn settle_tree(&mut self, plan: *mut Plan) {
        // SAFETY: valid nodes, of the types that their tags say, or NULL.
        unsafe {
            let Some(tag) = plan.cast::<Node>().as_ref().map(|node| node.type_) else { return };
            pg_sys::check_stack_depth();
            self.settle(plan);
            self.settle_tree((*plan).lefttree);
            self.settle_tree((*plan).righttree);
            match tag {
                NodeTag::T_Append => self.settle_list((*plan.cast::<pg_sys::Append>()).appendplans),
                NodeTag::T_MergeAppend => self.settle_list((*plan.cast::<pg_sys::MergeAppend>()).mergeplans),
                NodeTag::T_SubqueryScan => self.settle_tree((*plan.cast::<pg_sys::SubqueryScan>()).subplan),
                _ => {}
            }
        }
    }

    unsafe fn settle(&mut self, plan: *mut Plan) {
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
            self.0.push((plan, conditions));
            (*plan).qual = left;
        }
    }
}

impl Drop for Settled {
    fn drop(&mut self) {
        for &(plan, conditions) in &self.0 {
            // SAFETY: the plan outlives the start of its execution.
            unsafe { (*plan).qual = conditions };
        }
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
