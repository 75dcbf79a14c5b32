//! The application's users tables. The arguments of `attach_users_table` are stored in the arguments of its triggers,
//! so that a dump includes them, and so that dropping the triggers, or the table, leaves nothing behind.
//!
//! When a token is issued, its user is looked up and locked like the referenced row of a foreign key (`RI_FKey_check`):
//! with the rights of the table's owner, and with the transaction's own snapshot.
#![allow(unsafe_code)]

use super::as_role;
use super::fresh_snapshot::{Query, Snapshot};
use super::relations;
use super::statements::{Kept, with_plan};
use crate::error::Error;
use crate::pg::{datum, sys};
use core::cell::{Cell, RefCell};
use core::ffi::CStr;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, Datum, Oid};
use pgrx::spi::{OwnedPreparedStatement, Spi};
use pgrx::{IntoDatum, Uuid};
use std::collections::HashMap;
use std::rc::Rc;
use tollgate_core::service;

/// The triggers of an attached table, all with the same arguments. Without the first it does not count as attached, but
/// the others still have the arguments.
const TRIGGERS: [&CStr; 4] = [
    c"tollgate_user_changed",
    c"tollgate_user_deleted",
    c"tollgate_user_deletion_applied",
    c"tollgate_users_truncated",
];
const FUNCTIONS: [&CStr; 2] = [c"users_row_changed", c"revoke_departed_users"];

/// The arguments of each trigger that `attach_users_table` creates.
pub(crate) struct Attachment {
    /// The column's name when the table was attached.
    key_column: String,
    require_user: bool,
    /// The SQL condition under which a user is active.
    active: Option<String>,
    numbers: Option<ColumnNumbers>,
}

/// Columns by number, which survives a renaming. A dump and restore renumbers tables and columns, so the numbers apply
/// only to the table and the cluster that they were recorded for.
struct ColumnNumbers {
    system: i64,
    table: u32,
    key: i16,
    /// The columns that the condition reads; 0 stands for the whole row.
    condition: Vec<i16>,
}

impl ColumnNumbers {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        Some(ColumnNumbers {
            system: words.next()?.parse().ok()?,
            table: words.next()?.parse().ok()?,
            key: words.next()?.parse().ok()?,
            condition: words.map(|word| word.parse().ok()).collect::<Option<_>>()?,
        })
    }
}

/// An existing column.
#[derive(Clone, Copy)]
pub(crate) struct Column {
    number: i16,
    name: pg_sys::NameData,
    data_type: Oid,
    by_value: bool,
    length: i16,
    is_virtual: bool,
}

/// The types of key column whose text is the `user_id`: equal values have one text, whatever the settings are. The
/// casts and operators of these types are PostgreSQL's own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyType {
    Integer,
    Uuid,
    Text,
    /// `character(n)`, whose text has no padding.
    Padded,
}

pub(crate) struct Key {
    column: Column,
    key_type: KeyType,
}

impl KeyType {
    /// The key type of a type, or of a domain's base type.
    fn of(data_type: Oid) -> Option<Self> {
        // SAFETY: a look-up in the system catalogue.
        match unsafe { pg_sys::getBaseType(data_type) } {
            pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID => Some(KeyType::Integer),
            pg_sys::UUIDOID => Some(KeyType::Uuid),
            pg_sys::TEXTOID | pg_sys::VARCHAROID => Some(KeyType::Text),
            pg_sys::BPCHAROID => Some(KeyType::Padded),
            _ => None,
        }
    }

    /// The parameter value whose text is that user id, and its type; `None` if no value of the type has that text.
    fn parameter(self, user_id: &str) -> Option<(Oid, Datum)> {
        match self {
            KeyType::Integer => {
                let value: i64 = user_id.parse().ok()?;
                (value.to_string() == user_id).then_some((pg_sys::INT8OID, value.into_datum()?))
            }
            KeyType::Uuid => {
                let value: uuid::Uuid = user_id.parse().ok()?;
                let datum = Uuid::from_bytes(*value.as_bytes()).into_datum()?;
                (value.to_string() == user_id).then_some((pg_sys::UUIDOID, datum))
            }
            KeyType::Text => Some((pg_sys::TEXTOID, user_id.into_datum()?)),
            KeyType::Padded => Some((pg_sys::BPCHAROID, user_id.into_datum()?)),
        }
    }

    /// A condition on a key `u.k` that is true when its text is `d`, and that an index on the key supports. Where a
    /// collation takes different texts for equal, their bytes decide.
    pub(crate) fn condition(self) -> &'static str {
        match self {
            KeyType::Integer => {
                "u.k OPERATOR(pg_catalog.=) CASE WHEN d ~ '^(0|-?[1-9][0-9]{0,18})$' THEN
                     CASE WHEN d::numeric BETWEEN -9223372036854775808 AND 9223372036854775807 THEN d::bigint END END"
            }
            KeyType::Uuid => {
                "u.k OPERATOR(pg_catalog.=) CASE
                     WHEN d ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' THEN d::uuid END"
            }
            KeyType::Text => {
                "u.k OPERATOR(pg_catalog.=) d AND u.k::text COLLATE \"C\" OPERATOR(pg_catalog.=) d"
            }
            KeyType::Padded => {
                "u.k OPERATOR(pg_catalog.=) d::bpchar AND u.k::text COLLATE \"C\" OPERATOR(pg_catalog.=) d"
            }
        }
    }

    /// The text of a value, without calling an SQL function.
    fn text(self, value: Datum, length: i16) -> String {
        match (self, length) {
            (KeyType::Integer, 2) => (value.value() as i16).to_string(),
            (KeyType::Integer, 4) => (value.value() as i32).to_string(),
            (KeyType::Integer, _) => (value.value() as i64).to_string(),
            (KeyType::Uuid, _) => {
                // SAFETY: a uuid is 16 bytes by reference.
                let bytes = unsafe { value.cast_mut_ptr::<[u8; 16]>().read_unaligned() };
                uuid::Uuid::from_bytes(bytes).to_string()
            }
            (KeyType::Text | KeyType::Padded, _) => {
                // SAFETY: a value of a varlena type, in a row that is held.
                let text = String::from_utf8_lossy(unsafe { datum::varlena(value) });
                if self == KeyType::Padded {
                    text.trim_end_matches(' ').to_owned()
                } else {
                    text.into_owned()
                }
            }
        }
    }
}

/// An open table. Closed by [`Table::close`]; on an ERROR the transaction's resource owner closes it.
#[derive(Clone, Copy)]
pub(crate) struct Table(pg_sys::Relation);

impl Table {
    /// # Safety
    ///
    /// The relation is open for as long as the value is used.
    pub(crate) unsafe fn of(relation: pg_sys::Relation) -> Self {
        Table(relation)
    }

    /// `None` if the table no longer exists. The lock is kept until the transaction ends.
    pub(crate) fn open(table: Oid, lock: u32) -> Option<Self> {
        // SAFETY: any oid may be passed.
        let relation = unsafe { pg_sys::try_table_open(table, lock.cast_signed()) };
        (!relation.is_null()).then_some(Table(relation))
    }

    pub(crate) fn close(self) {
        // SAFETY: it is open.
        unsafe { pg_sys::table_close(self.0, pg_sys::NoLock.cast_signed()) }
    }

    pub(crate) fn oid(self) -> Oid {
        // SAFETY: it is open.
        unsafe { (*self.0).rd_id }
    }

    pub(crate) fn owner(self) -> Oid {
        // SAFETY: it is open.
        unsafe { (*(*self.0).rd_rel).relowner }
    }

    /// The topmost partitioned table of a partition; otherwise the table itself.
    pub(crate) fn root(self) -> Oid {
        // SAFETY: it is open; the look-up in the system catalogue allocates a list, and nothing of ours needs dropping
        // there.
        unsafe {
            if !(*(*self.0).rd_rel).relispartition {
                return self.oid();
            }
            let relation = self.oid();
            let ancestors = sys::guarded(|| sys::get_partition_ancestors(relation));
            pg_sys::list_nth_oid(ancestors, (*ancestors).length - 1)
        }
    }

    /// The table for a FROM clause, without tables that inherit from it.
    fn from(self) -> String {
        // SAFETY: look-ups in the system catalogue, whose results are palloc'ed C strings.
        unsafe {
            let only = (*(*self.0).rd_rel).relkind.cast_unsigned() != pg_sys::RELKIND_PARTITIONED_TABLE;
            format!("{}{}", if only { "ONLY " } else { "" }, self.name())
        }
    }

    pub(crate) fn name(self) -> String {
        // SAFETY: as above.
        unsafe {
            let form = &*(*self.0).rd_rel;
            let schema = pg_sys::get_namespace_name(form.relnamespace);
            let name = pg_sys::quote_qualified_identifier(schema, form.relname.data.as_ptr());
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }

    fn columns(self) -> impl Iterator<Item = Column> {
        // SAFETY: the descriptor is that of the table, which is open.
        let columns = unsafe { (*(*self.0).rd_att).natts };
        (1..=columns).filter_map(move |number| self.column(number as i16))
    }

    /// A column by number, if it exists.
    pub(crate) fn column(self, number: i16) -> Option<Column> {
        // SAFETY: as above. The number is that of a column.
        unsafe {
            let descriptor = pgrx::PgTupleDesc::from_pg_unchecked((*self.0).rd_att);
            let attribute = descriptor.get(usize::try_from(number.checked_sub(1)?).ok()?)?;
            (!attribute.attisdropped).then_some(Column {
                number,
                name: attribute.attname,
                data_type: attribute.atttypid,
                by_value: attribute.attbyval,
                length: attribute.attlen,
                is_virtual: attribute.attgenerated.cast_unsigned() == b'v',
            })
        }
    }

    fn column_of_name(self, name: &str) -> Option<Column> {
        self.columns().find(|column| column.name() == name)
    }

    /// The arguments of `attach_users_table`; `None` for a table that is not attached.
    pub(crate) fn arguments(self) -> Option<Vec<String>> {
        // SAFETY: the triggers of a table that is open.
        unsafe {
            let triggers = (*self.0).trigdesc.as_ref()?;
            let count = usize::try_from(triggers.numtriggers).unwrap_or(0);
            let triggers = core::slice::from_raw_parts(triggers.triggers, count);
            let named = |name: &CStr| {
                triggers
                    .iter()
                    .find(|trigger| CStr::from_ptr(trigger.tgname) == name && is_ours(trigger.tgfoid))
            };
            TRIGGERS.into_iter().find_map(named).map(|trigger| arguments_of(trigger))
        }
    }

    /// Whether an update of the column takes the lock that conflicts with FOR KEY SHARE (`INDEX_ATTR_BITMAP_KEY`).
    fn is_unique_key(self, column: Column) -> bool {
        // SAFETY: the table is open; bitmap numbers begin with those of the system columns.
        unsafe {
            let keys = pg_sys::RelationGetIndexAttrBitmap(
                self.0,
                pg_sys::IndexAttrBitmapKind::INDEX_ATTR_BITMAP_KEY,
            );
            pg_sys::bms_is_member(i32::from(column.number) - pg_sys::FirstLowInvalidHeapAttributeNumber, keys)
        }
    }
}

/// # Safety
///
/// A trigger of an open table.
pub(crate) unsafe fn arguments_of(trigger: &pg_sys::Trigger) -> Vec<String> {
    let count = usize::try_from(trigger.tgnargs).unwrap_or(0);
    let argument = |n| {
        // SAFETY: the caller's promise; arguments are C strings.
        unsafe { CStr::from_ptr(*trigger.tgargs.add(n)).to_string_lossy().into_owned() }
    };
    (0..count).map(argument).collect()
}

fn is_ours(function: Oid) -> bool {
    // SAFETY: look-ups in the system catalogue; the name is a palloc'ed C string or NULL.
    unsafe {
        let name = pg_sys::get_func_name(function);
        !name.is_null()
            && FUNCTIONS.contains(&CStr::from_ptr(name))
            && pg_sys::get_func_namespace(function) == pg_sys::get_namespace_oid(c"tollgate".as_ptr(), true)
    }
}

impl Column {
    pub(crate) fn name(&self) -> &str {
        // SAFETY: names end with NUL, within their array.
        unsafe { CStr::from_ptr(self.name.data.as_ptr()) }.to_str().unwrap_or_default()
    }

    pub(crate) fn is_virtual(&self) -> bool {
        self.is_virtual
    }

    fn quoted(&self) -> String {
        // SAFETY: a C string, which is returned itself or as a palloc'ed copy.
        unsafe { CStr::from_ptr(pg_sys::quote_identifier(self.name.data.as_ptr())) }
            .to_string_lossy()
            .into_owned()
    }
}

impl Key {
    pub(crate) fn quoted(&self) -> String {
        self.column.quoted()
    }

    pub(crate) fn condition(&self) -> &'static str {
        self.key_type.condition()
    }

    /// The key of a row, as a user id.
    pub(crate) fn user_id(&self, row: &Row<'_>) -> Option<String> {
        Some(self.key_type.text(row.value(self.column)?, self.column.length))
    }
}

impl Attachment {
    pub(crate) fn parse(arguments: &[String]) -> Result<Self, Error> {
        let [key_column, require_user, _, active, numbers] = arguments else {
            return Err(Error::internal("the arguments of a trigger of attach_users_table were changed"));
        };
        Ok(Attachment {
            key_column: key_column.clone(),
            require_user: require_user == "true",
            active: Some(active.clone()).filter(|active| !active.is_empty()),
            numbers: ColumnNumbers::parse(numbers),
        })
    }

    fn numbers_in(&self, root: Oid) -> Option<&ColumnNumbers> {
        // SAFETY: reads a constant of the cluster.
        let system = unsafe { pg_sys::GetSystemIdentifier() }.cast_signed();
        self.numbers.as_ref().filter(|numbers| numbers.system == system && numbers.table == root.to_u32())
    }

    /// The column of a table, or of a partition of it, that was the root's column of that number or name.
    fn follow(table: Table, number: Option<i16>, name: &str) -> Option<Column> {
        let root = table.root();
        let Some(number) = number else { return table.column_of_name(name) };
        if root == table.oid() {
            return table.column(number);
        }
        let whole = Table::open(root, pg_sys::AccessShareLock)?;
        let column = whole.column(number);
        whole.close();
        table.column_of_name(column?.name())
    }

    /// The key column in the table or in a partition of it, also if it was renamed.
    pub(crate) fn key(&self, table: Table) -> Result<Key, Error> {
        let number = self.numbers_in(table.root()).map(|numbers| numbers.key);
        let column = Attachment::follow(table, number, &self.key_column)
            .ok_or_else(|| Error::no_key_column(&table.name(), &self.key_column))?;
        key_of(table, column)
    }

    /// Whether two versions of a row agree in everything that decides whose row it is and whether the user is active.
    pub(crate) fn is_unchanged(&self, table: Table, key: &Key, old: &Row<'_>, new: &Row<'_>) -> bool {
        if !old.agrees(new, key.column) {
            return false;
        }
        if self.active.is_none() {
            return true;
        }
        let read = self.numbers_in(table.root()).map_or(&[0][..], |numbers| &numbers.condition);
        if read.contains(&0) {
            return table.columns().all(|column| old.agrees(new, column));
        }
        // If a column no longer exists, evaluating the condition will report it.
        read.iter().all(|&number| {
            Attachment::follow(table, Some(number), "").is_some_and(|column| old.agrees(new, column))
        })
    }
}

/// The key type of a column, or why it cannot be the key of a users table.
pub(crate) fn key_of(table: Table, column: Column) -> Result<Key, Error> {
    // Since PostgreSQL 18. It is NULL in the rows that triggers get.
    if column.is_virtual {
        return Err(Error::virtual_key(&table.name(), column.name()));
    }
    let Some(key_type) = KeyType::of(column.data_type) else {
        // SAFETY: the type of a column exists.
        let (base, name) = unsafe {
            (pg_sys::getBaseType(column.data_type), CStr::from_ptr(pg_sys::format_type_be(column.data_type)))
        };
        return Err(Error::unfit_key(&table.name(), column.name(), &name.to_string_lossy(), why_unfit(base)));
    };
    Ok(Key { column, key_type })
}

/// Why a type is unsuitable.
fn why_unfit(base: Oid) -> &'static str {
    match base {
        pg_sys::NUMERICOID => "equal numbers have several texts, such as 1 and 1.0",
        pg_sys::FLOAT4OID
        | pg_sys::FLOAT8OID
        | pg_sys::BYTEAOID
        | pg_sys::TIMESTAMPTZOID
        | pg_sys::TIMESTAMPOID
        | pg_sys::DATEOID
        | pg_sys::INTERVALOID
        | pg_sys::TIMETZOID
        | pg_sys::TIMEOID
        | pg_sys::MONEYOID
        | pg_sys::XMLOID => "the text of its values depends on settings such as DateStyle or bytea_output",
        _ => "its texts and comparisons may be anything",
    }
}

/// A row that a trigger got.
pub(crate) struct Row<'a> {
    values: &'a [Datum],
    nulls: &'a [bool],
}

impl Row<'_> {
    /// # Safety
    ///
    /// The slot holds a row for as long as the value is used.
    pub(crate) unsafe fn of(slot: *mut pg_sys::TupleTableSlot) -> Self {
        // SAFETY: the caller's promise; afterwards each column has a value.
        unsafe {
            pg_sys::slot_getallattrs(slot);
            let count = usize::try_from((*slot).tts_nvalid).unwrap_or(0);
            Row {
                values: core::slice::from_raw_parts((*slot).tts_values, count),
                nulls: core::slice::from_raw_parts((*slot).tts_isnull, count),
            }
        }
    }

    fn value(&self, column: Column) -> Option<Datum> {
        let at = usize::try_from(column.number).ok()?.checked_sub(1)?;
        (!*self.nulls.get(at)?).then(|| self.values[at])
    }

    /// Whether a column has the same bytes in another row; the type's own operators are not called.
    fn agrees(&self, other: &Row<'_>, column: Column) -> bool {
        match (self.value(column), other.value(column)) {
            (None, None) => true,
            // SAFETY: values of the column's type; detoasting allocates, and nothing of ours needs dropping there.
            (Some(one), Some(other)) => unsafe {
                sys::guarded(|| sys::datum_image_eq(one, other, column.by_value, i32::from(column.length)))
            },
            _ => false,
        }
    }
}

// ---- Issuing

/// The state of a user in the attached tables, where their rows are locked now.
pub(crate) struct UserState {
    /// The tables and key columns, if the user is in none of them although they require it.
    pub(crate) missing_in: Option<Vec<String>>,
    /// The user is in one of them, and inactive there.
    pub(crate) inactive: bool,
}

thread_local! {
    static ATTACHED_PLAN: Cell<pg_sys::SPIPlanPtr> = const { Cell::new(core::ptr::null_mut()) };
    static USER_PLAN: Cell<pg_sys::SPIPlanPtr> = const { Cell::new(core::ptr::null_mut()) };
    static SERVICE_PLAN: Cell<pg_sys::SPIPlanPtr> = const { Cell::new(core::ptr::null_mut()) };
    static APPLY_PLAN: Kept = const { Cell::new(None) };
    /// The attached tables, and when they were looked up.
    static ATTACHED: RefCell<(Option<u64>, Rc<[Oid]>)> = RefCell::new((None, Rc::new([])));
    /// The query for each table, as it was last prepared.
    static USER_QUERIES: RefCell<HashMap<Oid, Rc<UserQuery>>> = RefCell::new(HashMap::new());
}

struct UserQuery {
    statement: String,
    parameter: Oid,
    plan: OwnedPreparedStatement,
}

/// In the order of their oids, in which they are locked.
const ATTACHED_TABLES: Query = Query {
    statement: c"
        SELECT string_agg(t.tgrelid::text, ',' ORDER BY t.tgrelid)
        FROM pg_catalog.pg_proc p
        JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_proc'::regclass AND d.refobjid = p.oid
                                   AND d.classid = 'pg_catalog.pg_trigger'::regclass
        JOIN pg_catalog.pg_trigger t ON t.oid = d.objid AND t.tgname = 'tollgate_user_changed' AND t.tgparentid = 0
        WHERE p.pronamespace = (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = 'tollgate')
          AND p.proname = 'users_row_changed'
          -- Nor can those of other sessions be read.
          AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = t.tgrelid
                          AND pg_catalog.pg_is_other_temp_schema(c.relnamespace))",
    plan: &ATTACHED_PLAN,
};

const USER_OF_TOKEN: Query = Query {
    statement: c"SELECT (SELECT t.user_id FROM tollgate.api_tokens t WHERE t.id = $1)",
    plan: &USER_PLAN,
};

/// Locks the row of a service account, as `find` does those of other users.
const SERVICE: Query = Query {
    statement: c"
        SELECT (SELECT s.disabled_at IS NULL FROM tollgate.services s WHERE s.id = $1 FOR SHARE)::text",
    plan: &SERVICE_PLAN,
};

/// A service account is in no users table. One that is gone is not active.
fn look_up_service(id: &str) -> Result<UserState, Error> {
    let is_enabled = SERVICE.text(Snapshot::LatestToWrite, [(pg_sys::TEXTOID, id.into_datum())])?;
    Ok(UserState { missing_in: None, inactive: is_enabled.as_deref() != Some("true") })
}

fn attached() -> Result<Rc<[Oid]>, Error> {
    // Issuing and attaching wait for each other, so that each token is either issued and committed before a table is
    // attached, or issued after it.
    // SAFETY: an existing relation; the end of the transaction releases the lock.
    unsafe {
        pg_sys::LockRelationOid(relations::relations().api_tokens, pg_sys::RowExclusiveLock.cast_signed());
    }
    let now = relations::changes();
    let known = ATTACHED.with_borrow(|(when, tables)| (*when == Some(now)).then(|| tables.clone()));
    if let Some(tables) = known {
        return Ok(tables);
    }
    let listed = ATTACHED_TABLES.text(Snapshot::Latest, [])?.unwrap_or_default();
    let tables: Rc<[Oid]> = listed.split(',').filter_map(|oid| oid.parse().ok()).map(Oid::from_u32).collect();
    ATTACHED.set((Some(now), tables.clone()));
    Ok(tables)
}

/// Looks a user up in the attached tables, and locks their rows there until the transaction ends. Call it before any
/// lock on tokens: a transaction that deletes a user locks the user's row before the tokens.
pub(crate) fn look_up(user_id: &str) -> Result<UserState, Error> {
    let tables = attached()?;
    if let Some(id) = service::id_of(user_id) {
        return look_up_service(id);
    }
    let mut opened = Vec::with_capacity(tables.len());
    for &table in tables.iter() {
        // Dropped or detached since.
        let Some(table) = Table::open(table, pg_sys::RowShareLock) else { continue };
        if let Some(arguments) = table.arguments() {
            opened.push((table, Attachment::parse(&arguments)?));
        }
    }
    let required = opened.iter().any(|(_, attachment)| attachment.require_user);
    let (mut found, mut inactive, mut names) = (false, false, Vec::new());
    for (table, attachment) in &opened {
        if required || attachment.active.is_some() {
            let key = attachment.key(*table)?;
            match find(*table, attachment, &key, user_id)? {
                Some(active) => {
                    found = true;
                    inactive |= !active;
                }
                None => names.push(format!("{} ({})", table.name(), key.quoted())),
            }
        }
    }
    for (table, _) in opened {
        table.close();
    }
    Ok(UserState { missing_in: (required && !found).then_some(names), inactive })
}

/// The same for a token's user; `None` if there is no such token.
pub(crate) fn look_up_user_of(token_id: Uuid) -> Result<Option<UserState>, Error> {
    // A transaction that attaches a table waits from here on.
    attached()?;
    let user_id = USER_OF_TOKEN.text(Snapshot::Latest, [(pg_sys::UUIDOID, token_id.into_datum())])?;
    user_id.map(|user_id| look_up(&user_id)).transpose()
}

/// Locks a user's rows in one table, and returns whether one of them is active; `None` if there is none.
fn find(table: Table, attachment: &Attachment, key: &Key, user_id: &str) -> Result<Option<bool>, Error> {
    let Some((parameter, value)) = key.key_type.parameter(user_id) else { return Ok(None) };
    let column = key.column.quoted();
    let bytes = match key.key_type {
        KeyType::Text | KeyType::Padded => {
            format!(" AND {column}::text COLLATE \"C\" OPERATOR(pg_catalog.=) $2")
        }
        KeyType::Integer | KeyType::Uuid => String::new(),
    };
    // Updates of non-key columns take a weaker lock, which FOR KEY SHARE does not wait for.
    let (active, strength) = match &attachment.active {
        Some(active) => (format!("coalesce(({active}\n), false)"), "FOR SHARE"),
        None if table.is_unique_key(key.column) => ("true".to_owned(), "LIMIT 1 FOR KEY SHARE"),
        None => ("true".to_owned(), "LIMIT 1 FOR SHARE"),
    };
    let statement = format!(
        "SELECT {active} FROM {} WHERE {column} OPERATOR(pg_catalog.=) $1{bytes} {strength}",
        table.from()
    );
    // SAFETY: each datum is of the type given with it, and lives as long as this call.
    let arguments =
        unsafe { [DatumWithOid::new(value, parameter), DatumWithOid::new(user_id, pg_sys::TEXTOID)] };
    as_role::run(table.owner(), || {
        Spi::connect_mut(|client| {
            let known = USER_QUERIES.with_borrow(|all| {
                all.get(&table.oid())
                    .filter(|known| known.statement == statement && known.parameter == parameter)
                    .cloned()
            });
            let query = match known {
                Some(query) => query,
                None => {
                    let types = arguments.each_ref().map(|argument| pg_sys::PgOid::from(argument.oid()));
                    let plan = client.prepare_mut(statement.as_str(), &types)?.keep();
                    let query = Rc::new(UserQuery { statement, parameter, plan });
                    USER_QUERIES.with_borrow_mut(|all| all.insert(table.oid(), query.clone()));
                    query
                }
            };
            let mut state = None;
            for row in client.update(&query.plan, None, &arguments)? {
                state = Some(state == Some(true) || row.get::<bool>(1)?.unwrap_or(false));
            }
            Ok(state)
        })
    })
    .map_err(|error| as_role::not_read(&error))
}

/// Disables or enables the tokens of some users, after a change in a table.
pub(crate) fn apply_table(
    table: Table,
    arguments: Vec<String>,
    user_ids: Vec<String>,
    operation: &str,
) -> Result<(), Error> {
    // SAFETY: each datum is of the type given with it.
    let given = unsafe {
        [
            DatumWithOid::new(table.root(), pg_sys::OIDOID),
            DatumWithOid::new(arguments, pg_sys::TEXTARRAYOID),
            DatumWithOid::new(user_ids, pg_sys::TEXTARRAYOID),
            DatumWithOid::new(operation, pg_sys::TEXTOID),
        ]
    };
    with_plan(&APPLY_PLAN, "SELECT tollgate.settle_and_notify($1, $2, $3, $4)", &given, |_| Ok(()))
}
