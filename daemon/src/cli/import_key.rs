//! `tollgated import-key …`: keys with which other systems made the digests of their tokens.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;
use zeroize::Zeroizing;

use super::list::List;
use super::token::read_secret;
use crate::app::import_keys;
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::{
    DropImportKeyOptions, ImportKeyCommand, KeyEncoding, OutputOptions, StoreImportKeyOptions,
};
use crate::contract::document::Document;
use crate::error::{Error, Result};
use crate::hex;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn import_key(target: Target, command: ImportKeyCommand) -> Result<u8> {
    match command {
        ImportKeyCommand::Store(options) => store(target, options).await,
        ImportKeyCommand::List(output) => list(target, &output).await,
        ImportKeyCommand::Drop(options) => drop(target, options).await,
    }
}

async fn store(target: Target, options: StoreImportKeyOptions) -> Result<u8> {
    let text = read_secret(&options.file, "key", "Key (not shown): ")?;
    let key = decode(&text, options.encoding)?;
    let session = target.connect().await?;
    import_keys::store(&session, &options.name, &key).await?;
    done(&options.output, "stored", &options.name)
}

async fn drop(target: Target, options: DropImportKeyOptions) -> Result<u8> {
    let session = target.connect().await?;
    import_keys::drop(&session, &options.name).await?;
    done(&options.output, "dropped", &options.name)
}

fn done(output: &OutputOptions, verb: &str, name: &str) -> Result<u8> {
    if output.json {
        output::json(&json!({ verb: name }))?;
    } else if !output.quiet {
        output::line(format!("{verb} {name}"))?;
    }
    Ok(exit::OK)
}

async fn list(target: Target, options: &OutputOptions) -> Result<u8> {
    let columns = [
        Column::whole("NAME"),
        Column::whole("NEEDED"),
        Column::whole("OPENS"),
        Column::spare("STORED"),
        Column::spare("MASTER KEY"),
    ];
    let row = |key: &Document| {
        let yes_or_no = |name: &str| if key.field(name) == "true" { "yes" } else { "no" }.to_owned();
        [
            key.field("name"),
            yes_or_no("is_needed"),
            yes_or_no("can_open"),
            key.moment("created_at"),
            key.field("master_key"),
        ]
    };
    let session = target.connect().await?;
    let rows = import_keys::list(&session).await?;
    let list = List { key: "name", columns, row, tone: |_| Tone::Plain };
    if list.print(rows, options).await?.is_none() && options.is_for_people() {
        output::line("there are no import keys")?;
    }
    Ok(exit::OK)
}

/// The bytes of a key; no error quotes it.
fn decode(text: &str, encoding: KeyEncoding) -> Result<Zeroizing<Vec<u8>>> {
    let bytes = match encoding {
        KeyEncoding::Text => Some(text.as_bytes().to_vec()),
        KeyEncoding::Hex => hex::decode(text),
        KeyEncoding::Base64 => {
            let bare = text.trim_end_matches('=');
            URL_SAFE_NO_PAD.decode(bare).or_else(|_| STANDARD.decode(text)).ok()
        }
    };
    bytes.map(Zeroizing::new).ok_or_else(|| {
        Error::usage("the key is not written in that encoding".to_owned())
            .with_remedy("give --encoding text for a key that the other system uses as it is written")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_what_its_encoding_says_and_no_error_quotes_it() {
        for (text, encoding, bytes) in [
            ("00ff", KeyEncoding::Text, &b"00ff"[..]),
            ("00fF", KeyEncoding::Hex, &[0, 0xff]),
            ("AP8=", KeyEncoding::Base64, &[0, 0xff]),
            ("AP8", KeyEncoding::Base64, &[0, 0xff]),
            ("-_8=", KeyEncoding::Base64, &[0xfb, 0xff]),
            ("+/8=", KeyEncoding::Base64, &[0xfb, 0xff]),
        ] {
            assert_eq!(&decode(text, encoding).unwrap()[..], bytes, "{text}");
        }
        for (text, encoding) in
            [("secret0", KeyEncoding::Hex), ("00f", KeyEncoding::Hex), ("s*cret", KeyEncoding::Base64)]
        {
            let error = decode(text, encoding).unwrap_err().report();
            assert!(!error.contains(text), "{error}");
        }
    }
}
