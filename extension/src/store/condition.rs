//! The condition under which a user is active: which SQL it may contain, and which columns it reads.
#![allow(unsafe_code)]

use super::users::Table;
use crate::error::Error;
use core::ptr;
use pgrx::pg_sys;
use std::ffi::CString;

/// Analyses a condition over one row, without evaluating it, and returns the numbers of the columns it reads; 0 stands
/// for the whole row. Call it with the rights of the table's owner: even reading a literal may run the owner's code.
pub(crate) fn columns(table: Table, condition: &str) -> Result<Vec<i16>, Error> {
    let statement = CString::new(format!("SELECT ({condition}\n) FROM ONLY {}", table.name()))
        .map_err(|_| no_single_expression())?;
    // SAFETY: SPI's calls in order; an ERROR ends the connection with the (sub)transaction. The trees that are read
    // belong to the plan, which lives until SPI_finish.
    unsafe {
        pg_sys::SPI_connect();
        let plan = pg_sys::SPI_prepare(statement.as_ptr(), 0, ptr::null_mut());
        if plan.is_null() {
            return Err(no_single_expression());
        }
        let sources = pg_sys::SPI_plan_get_plan_sources(plan);
        if (*sources).length != 1 {
            return Err(no_single_expression());
        }
        let source = pg_sys::list_nth(sources, 0).cast::<pg_sys::CachedPlanSource>();
        let queries = (*source).query_list;
        if queries.is_null() || (*queries).length != 1 {
            return Err(no_single_expression());
        }
        let columns = of_query(table, &*pg_sys::list_nth(queries, 0).cast::<pg_sys::Query>());
        pg_sys::SPI_finish();
        columns
    }
}

/// # Safety
///
/// The query is analysed.
unsafe fn of_query(table: Table, query: &pg_sys::Query) -> Result<Vec<i16>, Error> {
    let length = |list: *mut pg_sys::List| {
        // SAFETY: a list, or NULL for an empty one.
        unsafe { list.as_ref() }.map_or(0, |list| list.length)
    };
    // SAFETY: the parts of the query.
    unsafe {
        let plain = query.commandType == pg_sys::CmdType::CMD_SELECT
            && length(query.rtable) == 1
            && length(query.targetList) == 1
            && (*query.jointree).quals.is_null()
            && query.setOperations.is_null()
            && query.havingQual.is_null()
            && query.limitCount.is_null()
            && query.limitOffset.is_null()
            && [query.cteList, query.groupClause, query.groupingSets, query.distinctClause, query.sortClause]
                .into_iter()
                .all(|list| length(list) == 0);
        if !plain || query.hasSubLinks || query.hasAggs || query.hasWindowFuncs || query.hasTargetSRFs {
            return Err(no_single_expression());
        }
        let expression = (*pg_sys::list_nth(query.targetList, 0).cast::<pg_sys::TargetEntry>()).expr;
        if pg_sys::exprType(expression.cast()) != pg_sys::BOOLOID {
            return Err(Error::unfit_condition("which is not a boolean", "Such as 'deleted_at IS NULL'."));
        }
        if pg_sys::contain_mutable_functions(expression.cast()) {
            return Err(Error::unfit_condition(
                "which does not depend on the row alone",
                "Call functions that are IMMUTABLE, and not now(): nothing is changed when time passes. Compare with NULL, or have a job set a column.",
            ));
        }
        let mut read = ptr::null_mut();
        pg_sys::pull_varattnos(expression.cast(), 1, &raw mut read);
        let (mut columns, mut member) = (Vec::new(), -1);
        loop {
            member = pg_sys::bms_next_member(read, member);
            if member < 0 {
                return Ok(columns);
            }
            let number = (member + pg_sys::FirstLowInvalidHeapAttributeNumber) as i16;
            if number < 0 {
                return Err(Error::unfit_condition(
                    "which reads a system column",
                    "Use columns of the table.",
                ));
            }
            // Which columns a virtual column is computed from is not examined: any change of the row counts.
            let is_virtual = number > 0 && table.column(number).is_some_and(|column| column.is_virtual());
            columns.push(if is_virtual { 0 } else { number });
        }
    }
}

fn no_single_expression() -> Error {
    Error::unfit_condition(
        "which is not a single expression over the columns of one row",
        "Such as 'deleted_at IS NULL'; without subqueries and aggregates.",
    )
}
