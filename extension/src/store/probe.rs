//! The direct probe: from a digest to a token's row, in one descent of one index, or in none if shared memory has a
//! hint at the row's location. In both cases the row itself is read and judged as it is now.
//!
//! It reads with the latest snapshot, not the active one: in a REPEATABLE READ transaction an older snapshot would
//! still show a token that has been revoked. It takes no row lock, assigns no transaction id and writes nothing, so it
//! works in READ ONLY transactions and on standbys. It holds a lock on table and index, a snapshot and a pin, all only
//! until the look-up is closed.
#![allow(unsafe_code)]

use super::relations::{self, Relations};
use crate::error::OrRaise;
use crate::pg::prefetch::prefetch;
use crate::pg::{compat, datum, sys};
use crate::shmem;
use crate::shmem::Location;
use core::cell::Cell;
use core::ffi::CStr;
use pgrx::pg_sys::{self, Datum};
use tollgate_core::net::Net;
use tollgate_core::token::{DIGEST_LEN, Digest};

/// Columns of `tollgate.api_tokens` by position, counted from 0. Columns are only ever appended to the table.
#[derive(Clone, Copy)]
pub(crate) enum Column {
    Id = 0,
    CreatedAt = 1,
    TokenHash = 2,
    UserId = 3,
    Name = 4,
    Scopes = 5,
    Metadata = 6,
    ExpiresAt = 7,
    DisabledAt = 8,
    RevokedAt = 9,
    RateLimit = 10,
    RateWindow = 11,
    AllowedIps = 12,
    QuotaId = 13,
    CreatedBy = 15,
}

/// The last of them: rows are deformed up to it.
const LAST_COLUMN: Column = Column::CreatedBy;

/// Columns that most verifications do not read, and so do not deform.
#[derive(Clone, Copy)]
pub(crate) enum LateColumn {
    RotatedTo = 20,
    ForeignFormat = 24,
}

/// The key that a token is looked up by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Index {
    /// The digest of the whole token.
    TokenHash,
    /// The key of a token that was imported in another format.
    ForeignHash,
    /// Its id.
    Id,
}

/// The columns that the library was built for; a table that was changed by hand is refused, not misread.
const EXPECTED: [(Column, &CStr, pg_sys::Oid); 15] = [
    (Column::Id, c"id", pg_sys::UUIDOID),
    (Column::CreatedAt, c"created_at", pg_sys::TIMESTAMPTZOID),
    (Column::TokenHash, c"token_hash", pg_sys::BYTEAOID),
    (Column::UserId, c"user_id", pg_sys::TEXTOID),
    (Column::Name, c"name", pg_sys::TEXTOID),
    (Column::Scopes, c"scopes", pg_sys::TEXTARRAYOID),
    (Column::Metadata, c"metadata", pg_sys::JSONBOID),
    (Column::ExpiresAt, c"expires_at", pg_sys::TIMESTAMPTZOID),
    (Column::DisabledAt, c"disabled_at", pg_sys::TIMESTAMPTZOID),
    (Column::RevokedAt, c"revoked_at", pg_sys::TIMESTAMPTZOID),
    (Column::RateLimit, c"rate_limit", pg_sys::INT4OID),
    (Column::RateWindow, c"rate_window", pg_sys::INTERVALOID),
    (Column::AllowedIps, c"allowed_ips", pg_sys::CIDRARRAYOID),
    (Column::QuotaId, c"quota_id", pg_sys::UUIDOID),
    (Column::CreatedBy, c"created_by", pg_sys::TEXTOID),
];

const EXPECTED_LATE: [(LateColumn, &CStr, pg_sys::Oid); 2] = [
    (LateColumn::RotatedTo, c"rotated_to", pg_sys::UUIDOID),
    (LateColumn::ForeignFormat, c"foreign_format", pg_sys::TEXTOID),
];

/// A token's row, in the shared buffer, which is pinned meanwhile.
pub(crate) struct TokenRow {
    slot: *mut pg_sys::TupleTableSlot,
}

impl TokenRow {
    /// The value of a column, `None` for NULL.
    pub(crate) fn datum(&self, column: Column) -> Option<Datum> {
        // SAFETY: the slot holds a row of which all columns up to the last one that we read are deformed.
        unsafe {
            let slot = &*self.slot;
            (!*slot.tts_isnull.add(column as usize)).then(|| *slot.tts_values.add(column as usize))
        }
    }

    /// The content of a column of type text.
    pub(crate) fn text(&self, column: Column) -> &str {
        let content = self.varlena(column).expect("read only of columns that are NOT NULL");
        core::str::from_utf8(content).expect("text in a UTF-8 database")
    }

    /// A column of type text[] or cidr[]; `None` for NULL.
    pub(crate) fn array(&self, column: Column) -> Option<datum::TextArray<'_>> {
        self.varlena(column).map(datum::TextArray::parse)
    }

    /// Microseconds since 2000-01-01.
    pub(crate) fn timestamp(&self, column: Column) -> Option<i64> {
        self.datum(column).map(|datum| datum.value().cast_signed() as i64)
    }

    pub(crate) fn int(&self, column: Column) -> Option<i32> {
        self.datum(column).map(|datum| datum.value() as i32)
    }

    /// In microseconds; a month is 30 days, as in PostgreSQL's comparison of intervals.
    pub(crate) fn interval(&self, column: Column) -> Option<i64> {
        const DAY: i64 = 86_400_000_000;
        self.datum(column).map(|datum| {
            // SAFETY: the column is of type interval (EXPECTED was checked), by reference into the buffer.
            let interval = unsafe { datum.cast_mut_ptr::<pg_sys::Interval>().read_unaligned() };
            let days = i64::from(interval.month) * 30 + i64::from(interval.day);
            days.saturating_mul(DAY).saturating_add(interval.time)
        })
    }

    pub(crate) fn id(&self) -> [u8; 16] {
        self.uuid(Column::Id).expect("id is NOT NULL")
    }

    /// A column of type uuid.
    pub(crate) fn uuid(&self, column: Column) -> Option<[u8; 16]> {
        // SAFETY: a uuid is 16 bytes by reference.
        self.datum(column).map(|datum| unsafe { *datum.cast_mut_ptr::<[u8; 16]>() })
    }

    /// Whether the token may be used from this address.
    pub(crate) fn allows(&self, client: Option<Net>) -> bool {
        let Some(networks) = self.array(Column::AllowedIps) else { return true };
        client.is_some_and(|client| {
            networks.present().filter_map(datum::net).any(|network| network.contains(&client))
        })
    }

    /// The digest under which the token is stored.
    pub(crate) fn digest(&self) -> Digest {
        let stored = self.varlena(Column::TokenHash).and_then(|stored| stored.try_into().ok());
        stored.expect("token_hash is NOT NULL, and of that length")
    }

    #[cold]
    pub(crate) fn has(&self, column: LateColumn) -> bool {
        let columns = column as i32 + 1;
        // SAFETY: the slot holds a row of a table with that many columns (EXPECTED_LATE was checked). Columns that are
        // already deformed stay in place.
        unsafe {
            if i32::from((*self.slot).tts_nvalid) < columns {
                sys::guarded(|| sys::slot_getsomeattrs_int(self.slot, columns));
            }
            !*(*self.slot).tts_isnull.add(column as usize)
        }
    }

    fn varlena(&self, column: Column) -> Option<&[u8]> {
        // SAFETY: the column is of a varlena type (EXPECTED was checked), and the buffer stays pinned while this lives.
        self.datum(column).map(|datum| unsafe { datum::varlena(datum) })
    }
}

/// A digest as bytea: PostgreSQL's length word, then the bytes.
#[repr(C)]
struct DigestDatum {
    length: u32,
    digest: Digest,
}

thread_local! {
    /// The scan keys without their argument, of a digest and of an id: looking up the comparison function costs as much
    /// as the comparison.
    static KEYS: Cell<[Option<pg_sys::ScanKeyData>; 2]> = const { Cell::new([None; 2]) };
    /// The epoch in which the table's columns were last checked.
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

/// A completed look-up, whether or not it found the token. It keeps the row in place until it is closed. Plain
/// pointers: on an ERROR the transaction's resource owner releases what they point to.
pub(crate) struct Lookup {
    open: Open,
    row: TokenRow,
}

#[derive(Clone, Copy)]
struct Open {
    table: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
    slot: *mut pg_sys::TupleTableSlot,
    /// `None` if the row was found by a hint.
    index: Option<(pg_sys::Relation, pg_sys::IndexScanDesc)>,
    found: Option<Location>,
}

impl Lookup {
    /// Looks up a token by its digest. Allocates in the current memory context, which must live until the look-up is
    /// closed.
    pub(crate) fn open(digest: &Digest) -> Self {
        shmem::prefetch_hint(digest);
        Lookup::by_digest(Index::TokenHash, digest)
    }

    /// Looks up a token by its id.
    pub(crate) fn open_id(id: &[u8; 16]) -> Self {
        Lookup::by(Index::Id, Datum::from(&raw const *id), None)
    }

    /// Looks up a token that was imported in another format and not used since, by its key.
    #[cold]
    pub(crate) fn open_foreign(key: &Digest) -> Option<Self> {
        let lookup = Lookup::by_digest(Index::ForeignHash, key);
        // Once it has a digest of its own, it is found only by that.
        if lookup.token().is_some_and(|token| token.has(LateColumn::ForeignFormat)) {
            return Some(lookup);
        }
        lookup.close();
        None
    }

    fn by_digest(by: Index, digest: &Digest) -> Self {
        let argument = DigestDatum { length: varlena_length(DIGEST_LEN), digest: *digest };
        let hinted = (by == Index::TokenHash).then_some(digest);
        Lookup::by(by, Datum::from(&raw const argument), hinted)
    }

    /// The argument is of the type of the index. With a digest, a hint may lead to the row.
    fn by(by: Index, argument: Datum, digest: Option<&Digest>) -> Self {
        let mut key = scan_key(by);
        key.sk_argument = argument;
        let mut hinted = digest;
        loop {
            let relations = relations::relations();
            let epoch = relations::epoch();
            if CHECKED_IN.get() != Some(epoch) {
                let columns = EXPECTED.map(|(column, name, oid)| (column as usize, name, oid));
                relations::check_columns(relations.api_tokens, "api_tokens", columns).or_raise();
                let late = EXPECTED_LATE.map(|(column, name, oid)| (column as usize, name, oid));
                relations::check_columns(relations.api_tokens, "api_tokens", late).or_raise();
                CHECKED_IN.set(Some(epoch));
            }
            // SAFETY: the closure holds nothing that needs dropping. The key is not read after the one descent.
            let Some(open) = (unsafe { sys::guarded(|| begin(&relations, by, epoch, hinted, &raw mut key)) })
            else {
                continue;
            };
            let lookup = Lookup { open, row: TokenRow { slot: open.slot } };
            match (open.found, digest) {
                (Some(place), Some(digest)) if open.index.is_some() => {
                    shmem::note_hint(digest, &lookup.row.id(), place);
                }
                // Another row is in this place: two tokens share a hint, or the row was vacuumed away.
                (Some(_), Some(digest)) if lookup.row.varlena(Column::TokenHash) != Some(digest) => {
                    lookup.close();
                    hinted = None;
                    continue;
                }
                _ => {}
            }
            return lookup;
        }
    }

    pub(crate) fn token(&self) -> Option<&TokenRow> {
        self.open.found.map(|_| &self.row)
    }

    pub(crate) fn close(self) {
        let (open, lock) = (self.open, pg_sys::AccessShareLock.cast_signed());
        // SAFETY: ends what `begin` began, in the opposite order; the row is not used any more.
        unsafe {
            sys::guarded(|| {
                if let Some((index, scan)) = open.index {
                    sys::index_endscan(scan);
                    sys::index_close(index, lock);
                }
                sys::ExecDropSingleTupleTableSlot(open.slot);
                sys::UnregisterSnapshot(open.snapshot);
                sys::table_close(open.table, lock);
            });
        }
    }
}

/// Looks up the token with a digest and calls `read` with its row.
pub(crate) fn with_token<R>(digest: &Digest, read: impl FnOnce(Option<&TokenRow>) -> R) -> R {
    let lookup = Lookup::open(digest);
    let result = read(lookup.token());
    lookup.close();
    result
}

/// Finds the row, by the hint for the digest or else by the index, and deforms it; `None` if the relations have changed
/// since their oids were looked up.
///
/// # Safety
///
/// Only inside `sys::guarded`.
unsafe fn begin(
    relations: &Relations,
    by: Index,
    epoch: u64,
    hinted: Option<&Digest>,
    key: pg_sys::ScanKey,
) -> Option<Open> {
    let lock = pg_sys::AccessShareLock.cast_signed();
    // SAFETY: oids of relations that the table lock protects, and an MVCC snapshot that stays registered until the scan
    // has ended.
    unsafe {
        let table = sys::try_table_open(relations.api_tokens, lock);
        // Waiting for the lock processes invalidations: the table may be gone, or the index replaced.
        if table.is_null() {
            relations::forget();
            return None;
        }
        if relations::epoch() != epoch {
            sys::table_close(table, lock);
            return None;
        }
        let hint = hinted.and_then(shmem::hint);
        if let Some(place) = hint {
            prefetch_line_pointer(place);
        }
        let snapshot = sys::RegisterSnapshot(sys::GetLatestSnapshot());
        let slot = sys::table_slot_create(table, core::ptr::null_mut());
        let mut open = Open { table, snapshot, slot, index: None, found: None };
        if let Some(place) = hint
            && fetch(&open, place)
        {
            open.found = hint;
        } else {
            let index = match by {
                Index::TokenHash => relations.token_hash_index,
                Index::ForeignHash => relations.foreign_hash_index,
                Index::Id => relations.token_id_index,
            };
            let index = sys::index_open(index, lock);
            let scan = compat::index_beginscan(table, index, snapshot);
            sys::index_rescan(scan, key, 1, core::ptr::null_mut(), 0);
            open.index = Some((index, scan));
            open.found = descend(scan, slot);
        }
        if open.found.is_some() {
            sys::slot_getsomeattrs_int(slot, Column::Id as i32 + 1);
            if let Some(id) = (TokenRow { slot }).uuid(Column::Id) {
                shmem::prefetch_counters(&id);
            }
            sys::slot_getsomeattrs_int(slot, LAST_COLUMN as i32 + 1);
        }
        Some(open)
    }
}

/// Stores the row that the index leads to in the slot, and returns the location that the index gave.
unsafe fn descend(scan: pg_sys::IndexScanDesc, slot: *mut pg_sys::TupleTableSlot) -> Option<Location> {
    // SAFETY: a scan that has its key, and a slot of its table.
    unsafe {
        loop {
            let tid = sys::index_getnext_tid(scan, pg_sys::ScanDirection::ForwardScanDirection).as_ref()?;
            // Read before the fetch, which may follow a chain of versions from here.
            let (block, offset) =
                (u32::from(tid.ip_blkid.bi_hi) << 16 | u32::from(tid.ip_blkid.bi_lo), tid.ip_posid);
            if sys::index_fetch_heap(scan, slot) {
                // Only a heap stores rows this way, and can be read by `fetch`.
                let is_heap = core::ptr::eq((*slot).tts_ops, &raw const pg_sys::TTSOpsBufferHeapTuple);
                let buffer =
                    if is_heap { (*slot.cast::<pg_sys::BufferHeapTupleTableSlot>()).buffer } else { 0 };
                return Some(Location { block, offset, buffer: buffer.cast_unsigned(), group: 0 });
            }
        }
    }
}

/// Prefetches what is needed to pin a page and find a row in it.
fn prefetch_line_pointer(place: Location) {
    let Some(buffer) = (place.buffer as usize).checked_sub(1) else { return };
    // SAFETY: two pointers that never change; only addresses are computed.
    let (descriptor, page) = unsafe {
        let page = pg_sys::BufferBlocks.wrapping_add(buffer.wrapping_mul(pg_sys::BLCKSZ as usize));
        (pg_sys::BufferDescriptors.wrapping_add(buffer), page)
    };
    prefetch(descriptor);
    prefetch(page);
    let line_pointers = core::mem::offset_of!(pg_sys::PageHeaderData, pd_linp);
    prefetch(page.wrapping_add(line_pointers + 4 * usize::from(place.offset.saturating_sub(1))));
}

/// Stores the row at a location in the slot, if the page is still in its buffer and the snapshot sees a row there. An
/// index scan does the same with the location that it finds.
unsafe fn fetch(open: &Open, place: Location) -> bool {
    // SAFETY: the buffer exists, which is all that is required to ask what it holds; the table is open, and the slot is
    // one for rows in shared buffers, as the table is a heap.
    unsafe {
        let buffer = place.buffer.cast_signed();
        if !(1..=pg_sys::NBuffers).contains(&buffer) || !compat::pin_if_still(open.table, place.block, buffer)
        {
            return false;
        }
        let mut tid = pg_sys::ItemPointerData {
            ip_blkid: pg_sys::BlockIdData { bi_hi: (place.block >> 16) as u16, bi_lo: place.block as u16 },
            ip_posid: place.offset,
        };
        let tuple = &raw mut (*open.slot.cast::<pg_sys::BufferHeapTupleTableSlot>()).base.tupdata;
        sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE.cast_signed());
        let found = sys::heap_hot_search_buffer(
            &raw mut tid,
            open.table,
            buffer,
            open.snapshot,
            tuple,
            core::ptr::null_mut(),
            true,
        );
        sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK.cast_signed());
        if found {
            sys::ExecStorePinnedBufferHeapTuple(tuple, open.slot, buffer);
        } else {
            sys::ReleaseBuffer(buffer);
        }
        found
    }
}

/// `SET_VARSIZE` for a content of that many bytes.
const fn varlena_length(content: usize) -> u32 {
    let size = (content + 4) as u32;
    if cfg!(target_endian = "little") { size << 2 } else { size }
}

fn scan_key(by: Index) -> pg_sys::ScanKeyData {
    let (place, equal) = match by {
        Index::TokenHash | Index::ForeignHash => (0, pg_sys::F_BYTEAEQ),
        Index::Id => (1, pg_sys::F_UUID_EQ),
    };
    KEYS.get()[place].unwrap_or_else(|| {
        let mut key = pg_sys::ScanKeyData::default();
        // SAFETY: fills a key that is ours, with memory that lives as long as the backend.
        unsafe {
            let previous = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
            pg_sys::ScanKeyInit(
                &raw mut key,
                1, // the first column of the index
                pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
                pg_sys::Oid::from(equal),
                Datum::null(),
            );
            pg_sys::MemoryContextSwitchTo(previous);
        }
        let mut keys = KEYS.get();
        keys[place] = Some(key);
        KEYS.set(keys);
        key
    })
}
