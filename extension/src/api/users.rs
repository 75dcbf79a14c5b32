//! The application's users tables: their row trigger, and the functions that `sql/schema/tokens/users_table.sql` calls.
#![allow(unsafe_code)]

use crate::error::{Error, OrRaise};
use crate::pg::fmgr::{Call, sql_function};
use crate::pg::read_only::refuse_if_read_only;
use crate::store::users::{Attachment, Row, Table};
use crate::store::{as_role, condition, users};
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, Datum, Oid};
use pgrx::spi::Spi;
use pgrx::{IntoDatum, Uuid};

// Called for each row; a statement that changes other columns costs next to nothing. With a WHEN clause or a list of
// columns on the trigger, PostgreSQL would refuse to change the type of the column.
sql_function!(users_row_changed);
fn users_row_changed(call: &Call) -> Option<Datum> {
    const EVENT: u32 = pg_sys::TRIGGER_EVENT_OPMASK;
    const FIRING: u32 = pg_sys::TRIGGER_EVENT_ROW | pg_sys::TRIGGER_EVENT_TIMINGMASK;
    let Some(data) = call.trigger().filter(|data| data.tg_event & FIRING == pg_sys::TRIGGER_EVENT_ROW) else {
        Error::internal("not called by a trigger AFTER … FOR EACH ROW").raise()
    };
    // SAFETY: the data of the running trigger; its rows and table stay valid until it returns.
    let (table, arguments, first, second) = unsafe {
        let is_update = data.tg_event & EVENT == pg_sys::TRIGGER_EVENT_UPDATE;
        (
            Table::of(data.tg_relation),
            users::arguments_of(&*data.tg_trigger),
            Row::of(data.tg_trigslot),
            is_update.then(|| Row::of(data.tg_newslot)),
        )
    };
    let attachment = Attachment::parse(&arguments).or_raise();
    let key = attachment.key(table).or_raise();
    if second.as_ref().is_some_and(|second| attachment.is_unchanged(table, &key, &first, second)) {
        return Some(Datum::null());
    }
    let mut keys: Vec<String> =
        [Some(&first), second.as_ref()].into_iter().flatten().filter_map(|row| key.user_id(row)).collect();
    keys.dedup();
    if keys.is_empty() {
        return Some(Datum::null());
    }
    let operation = match data.tg_event & EVENT {
        pg_sys::TRIGGER_EVENT_INSERT => "INSERT",
        pg_sys::TRIGGER_EVENT_UPDATE => "UPDATE",
        _ => "DELETE",
    };
    users::apply_table(table, arguments, keys, operation).or_raise();
    // The result of an AFTER trigger is ignored, but it must not be NULL.
    Some(Datum::null())
}

sql_function!(users_table_arguments);
fn users_table_arguments(call: &Call) -> Option<Datum> {
    with_table(call, |table| Ok(table.arguments())).into_datum()
}

// The quoted key column, and the condition that compares keys `u.k` with user ids `d`.
sql_function!(users_key);
fn users_key(call: &Call) -> Option<Datum> {
    let arguments: Vec<String> = call
        .text_array(1)?
        .present()
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect();
    with_table(call, |table| {
        let key = Attachment::parse(&arguments)?.key(table)?;
        Ok(Some(vec![key.quoted(), key.condition().to_owned()]))
    })
    .into_datum()
}

sql_function!(check_users_key);
fn check_users_key(call: &Call) -> Option<Datum> {
    let number: i16 = call.value(1)?;
    with_table(call, |table| {
        let Some(column) = table.column(number) else { return Ok(None) };
        users::key_of(table, column).map(|_| None::<()>)
    });
    Some(Datum::null())
}

// The numbers of the columns that a condition reads.
sql_function!(check_users_condition);
fn check_users_condition(call: &Call) -> Option<Datum> {
    let condition = call.text(1)?;
    with_table(call, |table| as_role::run(table.owner(), || condition::columns(table, condition)).map(Some))
        .into_datum()
}

// Whether a token's user is in an attached table and inactive there. Locks the user's rows.
sql_function!(user_is_inactive);
fn user_is_inactive(call: &Call) -> Option<Datum> {
    refuse_if_read_only(c"tollgate.set_api_token_enabled()");
    let token: Uuid = call.value(0)?;
    let user_state = users::look_up_user_of(token).or_raise();
    user_state.is_some_and(|user_state| user_state.inactive).into_datum()
}

/// Runs `work` on the table in the first argument, locked against changes until the transaction ends.
fn with_table<R>(call: &Call, work: impl FnOnce(Table) -> Result<Option<R>, Error>) -> Option<R> {
    let table = Table::open(call.value::<Oid>(0)?, pg_sys::AccessShareLock)?;
    let outcome = work(table).or_raise();
    table.close();
    outcome
}

/// Checks that the user exists, and locks their rows until the transaction ends. Call it before any lock on tokens. The
/// caller decides what to do about an inactive user.
pub(super) fn lock_user(user_id: &str) -> users::UserState {
    raise_if_missing(users::look_up(user_id).or_raise())
}

/// The same for a token's user; `None` if there is no such token.
pub(super) fn lock_user_of(token_id: Uuid) -> Option<users::UserState> {
    users::look_up_user_of(token_id).or_raise().map(raise_if_missing)
}

fn raise_if_missing(user_state: users::UserState) -> users::UserState {
    if let Some(tables) = &user_state.missing_in {
        Error::no_such_user(tables).raise();
    }
    user_state
}

/// Enables or disables an imported token as its user is active or not.
pub(super) fn apply_user_state(user_id: &str) {
    // SAFETY: the datum is of the type given with it.
    let given = [unsafe { DatumWithOid::new(user_id, pg_sys::TEXTOID) }];
    Spi::run_with_args("SELECT tollgate.settle_user($1)", &given)
        .map_err(|error| {
            Error::internal(format!("could not apply a user's state to the user's tokens: {error}"))
        })
        .or_raise();
}
