//! One row into a table of ours without a plan, as COPY inserts one: a column that is not given takes its default,
//! constraints are checked, and all indexes are kept, by the functions of the executor itself (`ExecSimpleRelationInsert`,
//! by which logical replication applies its changes). What only a statement does right, such as firing triggers and
//! following rules, is left to a statement: then [`Target::open`] opens nothing.
//!
//! A statement reads defaults, constraints and indexes from the catalogue and compiles them each time. Here they are
//! compiled once and kept until the table or any function changes. They are taken out while a row is inserted, and thrown
//! away if that fails, for expressions that were left half-evaluated must not be used again.
#![allow(unsafe_code)]

use super::relations::{self, Relations};
use crate::{compat, sys};
use core::cell::Cell;
use core::ffi::CStr;
use pgrx::pg_sys::{self, Datum, Oid};
use pgrx::prelude::*;
use std::thread::LocalKey;

/// A table, and the columns that are given in each row.
pub(crate) struct Table<const N: usize> {
    pub(crate) relation: fn(&Relations) -> Option<Oid>,
    pub(crate) given: [(&'static CStr, Oid); N],
    /// A column that is told of each row, of a type that is passed by value.
    pub(crate) told: (&'static CStr, Oid),
    pub(crate) kept: &'static LocalKey<Cell<*mut Compiled>>,
}

thread_local! {
    /// Counts what may have changed any function: an expression may hold what it was, inlined.
    static FUNCTIONS: Cell<u64> = const { Cell::new(0) };
}

pub(super) fn init() {
    // SAFETY: called once per process; the callback only counts.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::PROCOID.cast_signed();
        pg_sys::CacheRegisterSyscacheCallback(cache, Some(function_changed), Datum::null());
    };
}

/// Called by PostgreSQL whenever a function changed, at any moment: it may only mark.
#[pg_guard]
unsafe extern "C-unwind" fn function_changed(_arg: Datum, _cache: core::ffi::c_int, _hash: u32) {
    FUNCTIONS.set(FUNCTIONS.get() + 1);
}

/// What can be known of a table before a row is there. All that it points to is in the memory context of `state`.
pub(crate) struct Compiled {
    epoch: u64,
    functions: u64,
    state: *mut pg_sys::EState,
    /// The row's constraints and indexes, compiled by the executor at the first row.
    target: *mut pg_sys::ResultRelInfo,
    indexes: Vec<Oid>,
    /// Whether it has only such indexes as may be used again, and no generated columns.
    is_known: bool,
    /// Places of the columns that are given, in their order, and of the one that is told.
    given: Vec<usize>,
    told: usize,
    /// Those of all others that have a default.
    defaults: Vec<(usize, *mut pg_sys::ExprState)>,
}

impl Compiled {
    /// `None` if the columns are not those that are expected.
    ///
    /// # Safety
    ///
    /// The table is open and locked.
    unsafe fn new<const N: usize>(relation: pg_sys::Relation, table: &Table<N>) -> Option<Box<Self>> {
        // SAFETY: the table is open.
        let (oid, columns) = unsafe { ((*relation).rd_id, (*(*relation).rd_att).natts) };
        let place = |(name, column_type): (&CStr, Oid)| {
            let (mut found, mut modifier, mut collation) = (Oid::INVALID, 0, Oid::INVALID);
            // SAFETY: look-ups in the system catalogue, the second one of a column that exists.
            let number = unsafe {
                let number = pg_sys::get_attnum(oid, name.as_ptr());
                if number > 0 {
                    pg_sys::get_atttypetypmodcoll(
                        oid,
                        number,
                        &raw mut found,
                        &raw mut modifier,
                        &raw mut collation,
                    );
                }
                number
            };
            // A modifier would change the value.
            (found == column_type && modifier == -1).then(|| usize::try_from(number - 1).ok()).flatten()
        };
        let given = table.given.into_iter().map(place).collect::<Option<Vec<_>>>()?;
        let told = place(table.told)?;
        // SAFETY: makes a memory context that lives until it is dropped. The closure holds nothing that needs dropping.
        let state = unsafe {
            sys::guarded(|| {
                let previous = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
                let state = sys::CreateExecutorState();
                pg_sys::MemoryContextSwitchTo(previous);
                state
            })
        };
        // From here on the memory is freed on an ERROR.
        let mut compiled = Box::new(Compiled {
            epoch: 0,
            functions: 0,
            state,
            target: core::ptr::null_mut(),
            indexes: Vec::new(),
            is_known: true,
            given,
            told,
            defaults: Vec::new(),
        });
        // SAFETY: the table is open; the functions of the executor are called as by COPY. What they make lives as long as the
        // context that is switched to.
        unsafe {
            compiled.target = compiled.lasting(|| {
                let target = sys::palloc0(size_of::<pg_sys::ResultRelInfo>()).cast::<pg_sys::ResultRelInfo>();
                (*target).type_ = pg_sys::NodeTag::T_ResultRelInfo;
                sys::InitResultRelInfo(target, relation, 0, core::ptr::null_mut(), 0);
                sys::ExecOpenIndices(target, false);
                target
            });
            let target = &*compiled.target;
            for i in 0..usize::try_from(target.ri_NumIndices).unwrap_or(0) {
                let (index, info) =
                    (*target.ri_IndexRelationDescs.add(i), *target.ri_IndexRelationInfo.add(i));
                // Others keep what must not outlive the statement.
                compiled.is_known &=
                    (*(*index).rd_rel).relam == pg_sys::BTREE_AM_OID && (*info).ii_ExclusionOps.is_null();
                compiled.indexes.push((*index).rd_id);
            }
            // They are opened as at any later time.
            sys::guarded(|| sys::ExecCloseIndices(compiled.target));
            for place in 0..usize::try_from(columns).unwrap_or(0) {
                let number = place as i16 + 1;
                let column_type = pg_sys::get_atttype(oid, number);
                if column_type == Oid::INVALID || compiled.given.contains(&place) {
                    continue;
                }
                compiled.is_known &= pg_sys::get_attgenerated(oid, number) == 0
                    // A domain may refuse the NULL of a column that is not given, and changes by itself.
                    && pg_sys::get_typtype(column_type).cast_unsigned() != pg_sys::TYPTYPE_DOMAIN;
                let default = compiled.lasting(|| {
                    let expression = sys::build_column_default(relation, i32::from(number));
                    if expression.is_null() {
                        return core::ptr::null_mut();
                    }
                    let planned = sys::expression_planner(expression.cast());
                    sys::ExecInitExpr(planned, core::ptr::null_mut())
                });
                if !default.is_null() {
                    compiled.defaults.push((place, default));
                }
            }
        }
        Some(compiled)
    }

    /// Calls into PostgreSQL whose results are to live as long as this.
    ///
    /// # Safety
    ///
    /// As for `sys::guarded`.
    unsafe fn lasting<R: Copy>(&self, calls: impl FnOnce() -> R) -> R {
        // SAFETY: the caller's promise. On an ERROR the guard switches back.
        unsafe {
            let context = (*self.state).es_query_cxt;
            sys::guarded(|| {
                let previous = pg_sys::MemoryContextSwitchTo(context);
                let result = calls();
                pg_sys::MemoryContextSwitchTo(previous);
                result
            })
        }
    }

    /// # Safety
    ///
    /// The table is that for which this was compiled, open and locked, and has not changed since.
    unsafe fn open_indexes(&self, table: pg_sys::Relation) {
        // SAFETY: there is room for each index.
        unsafe {
            let target = self.target;
            (*target).ri_RelationDesc = table;
            sys::guarded(|| {
                for (i, index) in self.indexes.iter().enumerate() {
                    let index = sys::index_open(*index, pg_sys::RowExclusiveLock.cast_signed());
                    *(*target).ri_IndexRelationDescs.add(i) = index;
                    // All that changes of an index without the table being told: CREATE INDEX CONCURRENTLY waits, after this, for
                    // whoever has the table locked.
                    let info = *(*target).ri_IndexRelationInfo.add(i);
                    (*info).ii_ReadyForInserts = (*(*index).rd_index).indisready;
                }
            });
        }
    }

    /// `GetPerTupleExprContext`, a macro in C.
    ///
    /// # Safety
    ///
    /// Only inside `sys::guarded`.
    unsafe fn per_tuple_context(&self) -> *mut pg_sys::ExprContext {
        // SAFETY: the state lives as long as this.
        unsafe {
            let made = (*self.state).es_per_tuple_exprcontext;
            if made.is_null() { sys::MakePerTupleExprContext(self.state) } else { made }
        }
    }
}

fn take(kept: &'static LocalKey<Cell<*mut Compiled>>) -> Option<Box<Compiled>> {
    let pointer = kept.replace(core::ptr::null_mut());
    // SAFETY: `keep` put it there, and nobody else has it.
    (!pointer.is_null()).then(|| unsafe { Box::from_raw(pointer) })
}

/// A plain pointer, so that nothing is freed when the process ends, after PostgreSQL has freed everything.
fn keep(kept: &'static LocalKey<Cell<*mut Compiled>>, compiled: Box<Compiled>) {
    // While a row was inserted, one of its expressions may have led here again.
    drop(take(kept));
    kept.set(Box::into_raw(compiled));
}

/// Whether inserting a row is no more than defaults, constraints and indexes, and nobody watches statements do it.
///
/// # Safety
///
/// The table is open and locked.
unsafe fn is_plain(relation: pg_sys::Relation) -> bool {
    // SAFETY: the table is open, and so its entry in the cache is valid; a hook is only compared with NULL.
    unsafe {
        let class = &*(*relation).rd_rel;
        let has_insert_triggers = (*relation).trigdesc.as_ref().is_some_and(|triggers| {
            triggers.trig_insert_before_row
                || triggers.trig_insert_after_row
                || triggers.trig_insert_instead_row
                || triggers.trig_insert_before_statement
                || triggers.trig_insert_after_statement
                || triggers.trig_insert_new_table
        });
        let audited = pg_sys::ExecutorCheckPerms_hook;
        class.relkind.cast_unsigned() == pg_sys::RELKIND_RELATION
            && !class.relispartition
            && (*relation).rd_rules.is_null()
            && !class.relrowsecurity
            && !has_insert_triggers
            && audited.is_none()
            && pg_sys::pg_class_aclcheck((*relation).rd_id, pg_sys::GetUserId(), compat::ACL_INSERT)
                == pg_sys::AclResult::ACLCHECK_OK
    }
}

impl Drop for Compiled {
    fn drop(&mut self) {
        // SAFETY: made by `compile`, and used by nothing any more. It holds memory and nothing else.
        unsafe { pg_sys::MemoryContextDelete((*self.state).es_query_cxt) };
    }
}

/// A table that is open for rows to be inserted, with its indexes.
pub(crate) struct Target<const N: usize> {
    table: pg_sys::Relation,
    compiled: Option<Box<Compiled>>,
    kept: &'static LocalKey<Cell<*mut Compiled>>,
}

impl<const N: usize> Target<N> {
    /// `None` if it takes a statement to insert a row. The lock on the table is kept until the transaction ends, so what was
    /// found of it holds.
    pub(crate) fn open(table: &Table<N>) -> Option<Self> {
        // Somebody may change functions all the time.
        for _ in 0..3 {
            let oid = (table.relation)(&relations::relations())?;
            // SAFETY: any number may be asked for.
            let relation = unsafe { pg_sys::try_table_open(oid, pg_sys::RowExclusiveLock.cast_signed()) };
            if relation.is_null() {
                relations::forget();
                continue;
            }
            // Waiting for the lock, we may have been told of changes.
            let (epoch, functions) = (relations::epoch(), FUNCTIONS.get());
            let mut target = Target { table: relation, compiled: None, kept: table.kept };
            // SAFETY: open and locked.
            if !unsafe { is_plain(relation) } {
                return None;
            }
            let mut compiled = match take(table.kept) {
                Some(kept) if (kept.epoch, kept.functions) == (epoch, functions) => kept,
                // SAFETY: open and locked.
                _ => unsafe { Compiled::new(relation, table)? },
            };
            (compiled.epoch, compiled.functions) = (epoch, functions);
            // SAFETY: the table for which it was compiled, which has not changed.
            unsafe { compiled.open_indexes(relation) };
            if !target.compiled.insert(compiled).is_known {
                return None;
            }
            // The indexes were locked after that, so they may have brought news as well.
            if (relations::epoch(), FUNCTIONS.get()) == (epoch, functions) {
                return Some(target);
            }
        }
        None
    }

    /// Inserts a row, which the next statement sees, and tells its column that is told.
    pub(crate) fn insert(&mut self, row: [Option<Datum>; N]) -> Option<Datum> {
        let table = self.table;
        let compiled = self.compiled.as_deref()?;
        // SAFETY: the slot is one for rows of the table, which is open with its indexes; the values are of their columns' types,
        // as was checked when the table was compiled. The closure holds nothing that needs dropping: on an ERROR the
        // transaction releases what it opened.
        unsafe {
            sys::guarded(|| {
                sys::CommandCounterIncrement();
                let slot = sys::table_slot_create(table, core::ptr::null_mut());
                let nulls = (*slot).tts_isnull;
                core::ptr::write_bytes(nulls, 1, (*(*slot).tts_tupleDescriptor).natts as usize);
                let put = |place: usize, value: Option<Datum>| {
                    *nulls.add(place) = value.is_none();
                    *(*slot).tts_values.add(place) = value.unwrap_or(Datum::null());
                };
                for (place, value) in compiled.given.iter().zip(row) {
                    put(*place, value);
                }
                let context = compiled.per_tuple_context();
                let previous = pg_sys::MemoryContextSwitchTo((*context).ecxt_per_tuple_memory);
                for (place, default) in &compiled.defaults {
                    let mut null = false;
                    if let Some(evaluate) = (**default).evalfunc {
                        let value = evaluate(*default, context, &raw mut null);
                        put(*place, (!null).then_some(value));
                    }
                }
                pg_sys::MemoryContextSwitchTo(previous);
                sys::ExecStoreVirtualTuple(slot);
                let told = (!*nulls.add(compiled.told)).then(|| *(*slot).tts_values.add(compiled.told));
                sys::ExecSimpleRelationInsert(compiled.target, compiled.state, slot);
                sys::ExecDropSingleTupleTableSlot(slot);
                sys::MemoryContextReset((*context).ecxt_per_tuple_memory);
                sys::CommandCounterIncrement();
                told
            })
        }
    }
}

impl<const N: usize> Drop for Target<N> {
    fn drop(&mut self) {
        // After an ERROR the transaction closes what was opened, and what was compiled is dropped.
        if std::thread::panicking() {
            return;
        }
        // SAFETY: closes what `open` opened.
        unsafe {
            if let Some(compiled) = self.compiled.take() {
                sys::guarded(|| sys::ExecCloseIndices(compiled.target));
                keep(self.kept, compiled);
            }
            sys::guarded(|| sys::table_close(self.table, pg_sys::NoLock.cast_signed()));
        }
    }
}
