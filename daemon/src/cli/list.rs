//! What `list` commands print, however long the list is: rows are printed as they come.

use std::pin::pin;

use futures_util::{Stream, TryStreamExt as _};

use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::OutputOptions;
use crate::contract::document::Document;
use crate::error::Result;

/// A table is as wide as its widest row, so rows are gathered: up to this number, or to these bytes. A longer list is several
/// tables.
const TABLE_ROWS: usize = 1000;
const TABLE_BYTES: usize = 1024 * 1024;

/// Where a list ended.
#[derive(Clone, Debug)]
pub(super) struct Last {
    pub(super) key: String,
    /// How many rows there were.
    pub(super) count: u64,
}

/// How a row is shown.
pub(super) struct List<const N: usize, R: Fn(&Document) -> [String; N]> {
    /// What is shown of it with `--quiet`.
    pub(super) key: &'static str,
    pub(super) columns: [Column; N],
    pub(super) row: R,
    pub(super) tone: fn(&str) -> Tone,
}

impl<const N: usize, R: Fn(&Document) -> [String; N]> List<N, R> {
    /// The last row, or nothing if there were none.
    pub(super) async fn print(
        &self,
        rows: impl Stream<Item = Result<Document>>,
        options: &OutputOptions,
    ) -> Result<Option<Last>> {
        let mut rows = pin!(rows);
        let mut last: Option<Last> = None;
        let (mut table, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.try_next().await? {
            if options.json {
                output::json_piece(if last.is_some() { "," } else { "[" }, &row)?;
            } else if options.quiet {
                output::line(row.field(self.key))?;
            } else {
                let cells = (self.row)(&row);
                bytes += cells.iter().map(String::len).sum::<usize>();
                table.push(cells);
                if table.len() >= TABLE_ROWS || bytes >= TABLE_BYTES {
                    self.print_table(&mut table)?;
                    bytes = 0;
                }
            }
            let count = last.map_or(0, |last| last.count) + 1;
            last = Some(Last { key: row.field(self.key), count });
        }
        if options.json {
            output::json_end(if last.is_some() { "]" } else { "[]" })?;
        }
        self.print_table(&mut table)?;
        Ok(last)
    }

    fn print_table(&self, rows: &mut Vec<[String; N]>) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        output::line(output::table(self.columns, rows.drain(..), self.tone))
    }
}
