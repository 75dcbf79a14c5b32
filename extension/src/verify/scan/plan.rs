//! Planning: which calls the custom scan replaces, and the plan node for the executor.
#![allow(unsafe_code)]

use super::exec;
use crate::pg::guard;
use crate::pg::list::{list_len, list_nth, new_node};
use crate::verify::request::Function;
use core::ffi::{CStr, c_char, c_void};
use pgrx::pg_sys::{self, Index, List, Node, NodeTag, Oid};
use std::sync::OnceLock;

static NEXT_HOOK: OnceLock<pg_sys::set_rel_pathlist_hook_type> = OnceLock::new();

pub(crate) fn init() {
    // SAFETY: called once per process, while it loads libraries; our hook calls the previous one.
    unsafe {
        let _ = NEXT_HOOK.set(pg_sys::set_rel_pathlist_hook);
        pg_sys::set_rel_pathlist_hook = Some(set_rel_pathlist);
    }
}

unsafe extern "C-unwind" fn set_rel_pathlist(
    root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    rti: Index,
    rte: *mut pg_sys::RangeTblEntry,
) {
    // SAFETY: the planner passes valid nodes, to the previous hook and to ours. An ERROR of the previous hook jumps
    // over a frame that owns nothing.
    unsafe {
        if let Some(next) = NEXT_HOOK.get().copied().flatten() {
            next(root, rel, rti, rte);
        }
        if (*rte).rtekind != pg_sys::RTEKind::RTE_FUNCTION {
            return;
        }
        guard::entry(|| {
            if let Some((function, call)) = simple_call(rel, rte) {
                offer(rel, function, call);
            }
        });
    }
}

/// The function call, if this range table entry consists of one of our functions only, needs no value from the rest of
/// the query, and its row is not used as a composite value (EvalPlanQual would use it so).
unsafe fn simple_call(
    rel: *mut pg_sys::RelOptInfo,
    rte: *mut pg_sys::RangeTblEntry,
) -> Option<(Function, *mut pg_sys::FuncExpr)> {
    // SAFETY: valid nodes of the types that the parser puts into a function's range table entry.
    unsafe {
        if (*rte).funcordinality || list_len((*rte).functions) != 1 {
            return None;
        }
        let entry = list_nth((*rte).functions, 0).cast::<pg_sys::RangeTblFunction>();
        let call = (*entry).funcexpr.cast::<pg_sys::FuncExpr>();
        if (*call).xpr.type_ != NodeTag::T_FuncExpr || !(*entry).funccolnames.is_null() {
            return None;
        }
        let function = our_function((*call).funcid)?;
        let fixed = !varies((*call).args.cast(), core::ptr::null_mut());
        let columns_only = own_columns(rel, (*(*rel).reltarget).exprs)
            .chain(own_columns(rel, pg_sys::extract_actual_clauses((*rel).baserestrictinfo, false)))
            .all(|var| (*var).varattno > 0);
        (fixed && columns_only).then_some((function, call))
    }
}

/// Which of our functions it is. A function of the same name in a schema of the same name does not count.
unsafe fn our_function(oid: Oid) -> Option<Function> {
    // SAFETY: look-ups in the system catalogue; names are palloc'ed C strings or NULL.
    unsafe {
        let named = |name: *const c_char, wanted: &CStr| !name.is_null() && CStr::from_ptr(name) == wanted;
        if !named(pg_sys::get_namespace_name(pg_sys::get_func_namespace(oid)), c"tollgate") {
            return None;
        }
        let name = pg_sys::get_func_name(oid);
        let function = Function::ALL.into_iter().find(|function| named(name, function.name()))?;
        let owner = pg_sys::getExtensionOfObject(pg_sys::ProcedureRelationId, oid);
        (owner != Oid::INVALID && owner == pg_sys::get_extension_oid(c"tollgate".as_ptr(), true))
            .then_some(function)
    }
}

/// Whether an expression could change its value between rescans.
unsafe extern "C-unwind" fn varies(node: *mut Node, context: *mut c_void) -> bool {
    // SAFETY: the walker passes valid nodes or NULL.
    unsafe {
        guard::entry(|| {
            let Some(tag) = node.as_ref().map(|node| node.type_) else { return false };
            match tag {
                NodeTag::T_Var
                | NodeTag::T_PlaceHolderVar
                | NodeTag::T_SubPlan
                | NodeTag::T_AlternativeSubPlan => true,
                NodeTag::T_Param => {
                    (*node.cast::<pg_sys::Param>()).paramkind != pg_sys::ParamKind::PARAM_EXTERN
                }
                _ => pg_sys::expression_tree_walker(node, Some(varies), context),
            }
        })
    }
}

/// Replaces the function scan, which is the only path.
unsafe fn offer(rel: *mut pg_sys::RelOptInfo, function: Function, call: *mut pg_sys::FuncExpr) {
    // SAFETY: a valid relation of the planner's; the new path is allocated in its memory context.
    unsafe {
        if list_len((*rel).pathlist) != 1 {
            return;
        }
        let scan = list_nth((*rel).pathlist, 0).cast::<pg_sys::Path>();
        if (*scan).pathtype != NodeTag::T_FunctionScan {
            return;
        }
        let path = new_node::<pg_sys::CustomPath>(NodeTag::T_CustomPath);
        (*path).path = *scan;
        (*path).path.type_ = NodeTag::T_CustomPath;
        (*path).path.pathtype = NodeTag::T_CustomScan;
        // Without a tuplestore it costs less than a function scan, so the planner prefers this path.
        (*path).path.startup_cost = 0.0;
        (*path).path.total_cost /= 2.0;
        (*path).flags = pg_sys::CUSTOMPATH_SUPPORT_PROJECTION | pg_sys::CUSTOMPATH_SUPPORT_BACKWARD_SCAN;
        (*path).custom_private = pg_sys::lappend(core::ptr::null_mut(), call.cast());
        (*path).methods = &raw const PATH_METHODS[function as usize].0;
        pg_sys::add_path(rel, path.cast());
    }
}

/// PostgreSQL's tables of methods hold pointers to names and functions that never change.
struct Methods<T>(T);
// SAFETY: as above; they are only read.
unsafe impl<T> Sync for Methods<T> {}

static PATH_METHODS: [Methods<pg_sys::CustomPathMethods>; Function::ALL.len()] = {
    const fn methods<const F: usize>() -> Methods<pg_sys::CustomPathMethods> {
        Methods(pg_sys::CustomPathMethods {
            CustomName: Function::ALL[F].name().as_ptr(),
            PlanCustomPath: Some(plan::<F>),
            ReparameterizeCustomPathByChild: None,
        })
    }
    [methods::<0>(), methods::<1>(), methods::<2>(), methods::<3>()]
};

static SCAN_METHODS: [Methods<pg_sys::CustomScanMethods>; Function::ALL.len()] = {
    const fn methods<const F: usize>() -> Methods<pg_sys::CustomScanMethods> {
        Methods(pg_sys::CustomScanMethods {
            CustomName: Function::ALL[F].name().as_ptr(),
            CreateCustomScanState: Some(exec::create_state::<F>),
        })
    }
    [methods::<0>(), methods::<1>(), methods::<2>(), methods::<3>()]
};

unsafe extern "C-unwind" fn plan<const F: usize>(
    _root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    path: *mut pg_sys::CustomPath,
    targets: *mut List,
    clauses: *mut List,
    _plans: *mut List,
) -> *mut pg_sys::Plan {
    // SAFETY: the planner passes the path that `offer` made, and lists of the kinds that their names say.
    unsafe { guard::entry(|| custom_scan(rel, path, targets, clauses, &raw const SCAN_METHODS[F].0).cast()) }
}

unsafe fn custom_scan(
    rel: *mut pg_sys::RelOptInfo,
    path: *mut pg_sys::CustomPath,
    targets: *mut List,
    clauses: *mut List,
    methods: *const pg_sys::CustomScanMethods,
) -> *mut pg_sys::CustomScan {
    // SAFETY: what the planner passed to `plan`.
    unsafe {
        let quals = pg_sys::extract_actual_clauses(clauses, false);
        let node = new_node::<pg_sys::CustomScan>(NodeTag::T_CustomScan);
        (*node).scan.plan.targetlist = targets;
        (*node).scan.plan.qual = quals;
        (*node).flags = (*path).flags;
        // In custom_exprs, so that the plan records its dependency on the function.
        (*node).custom_exprs = (*path).custom_private;
        // The needed columns, in the order in which they are first referenced: if the targets are just these columns,
        // no projection is needed. The planner may later replace the targets by others over the same columns.
        let targets_to_be = (*(*rel).reltarget).exprs;
        let wanted =
            own_columns(rel, targets).chain(own_columns(rel, quals)).chain(own_columns(rel, targets_to_be));
        for var in wanted {
            let known = (0..list_len((*node).custom_scan_tlist)).any(|i| {
                let entry = list_nth((*node).custom_scan_tlist, i).cast::<pg_sys::TargetEntry>();
                (*(*entry).expr.cast::<pg_sys::Var>()).varattno == (*var).varattno
            });
            if !known {
                let position = list_len((*node).custom_scan_tlist) + 1;
                let copy = pg_sys::copyObjectImpl(var.cast());
                let entry =
                    pg_sys::makeTargetEntry(copy.cast(), position as i16, core::ptr::null_mut(), false);
                (*node).custom_scan_tlist = pg_sys::lappend((*node).custom_scan_tlist, entry.cast());
            }
        }
        (*node).methods = methods;
        node
    }
}

/// The Vars in a list of expressions that are columns of this relation.
unsafe fn own_columns(
    rel: *mut pg_sys::RelOptInfo,
    expressions: *mut List,
) -> impl Iterator<Item = *mut pg_sys::Var> {
    let into_all =
        pg_sys::PVC_RECURSE_AGGREGATES | pg_sys::PVC_RECURSE_WINDOWFUNCS | pg_sys::PVC_RECURSE_PLACEHOLDERS;
    // SAFETY: a list of expressions, and a relation, of the planner's.
    unsafe {
        let relid = (*rel).relid;
        let found = pg_sys::pull_var_clause(expressions.cast(), into_all.cast_signed());
        (0..list_len(found))
            .map(move |i| list_nth(found, i).cast::<pg_sys::Var>())
            .filter(move |&var| u32::try_from((*var).varno) == Ok(relid))
    }
}
