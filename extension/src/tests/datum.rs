//! The readers of PostgreSQL's values, compared with PostgreSQL's own.
#![allow(unsafe_code)]

use crate::pg::datum::TextArray;

fn contents(array: &TextArray<'_>) -> Vec<Option<String>> {
    array
        .iter()
        .map(|element| element.map(|content| String::from_utf8(content.to_vec()).expect("UTF-8")))
        .collect()
}

/// An array's content as it is in memory, with elements that have short headers.
#[test]
fn elements_with_short_headers_are_read() {
    let mut content = Vec::new();
    for word in [1i32, 0, 25, 3, 1] {
        content.extend(word.to_ne_bytes());
    }
    for text in ["a", "", "four"] {
        let size = u8::try_from(text.len() + 1).expect("short");
        content.push(if cfg!(target_endian = "little") { (size << 1) | 1 } else { size | 0x80 });
        content.extend(text.as_bytes());
        content.resize(content.len().next_multiple_of(4), 0);
    }
    let array = TextArray::parse(&content);
    assert_eq!((array.dimensions(), array.len(), array.has_nulls()), (1, 3, false));
    assert_eq!(contents(&array), ["a", "", "four"].map(|text| Some(text.to_owned())));
}

#[pgrx::pg_schema]
mod tests {
    use super::contents;
    use crate::pg::datum;
    use crate::pg::datum::TextArray;
    use pgrx::pg_sys::Datum;
    use pgrx::prelude::*;
    use tollgate_core::net::Net;

    /// Calls `read` with the first column of each row, while it is in place.
    fn for_each(query: &str, mut read: impl FnMut(Option<Datum>, Option<String>)) {
        Spi::connect(|client| {
            let mut rows = client.select(query, None, &[])?;
            assert!(!rows.is_empty(), "no row: {query}");
            while rows.next().is_some() {
                read(rows.get_datum_by_ordinal(1)?, rows.get(2)?);
            }
            Ok::<_, pgrx::spi::Error>(())
        })
        .expect("a query");
    }

    fn assert_read_alike(query: &str, len: usize, dimensions: usize) {
        for_each(query, |value, _| {
            let value = value.expect("an array");
            // SAFETY: a text[], in place while the query is open.
            let (array, expected) = unsafe {
                let array = TextArray::parse(datum::varlena(value));
                (array, Vec::<Option<String>>::from_datum(value, false).expect("an array"))
            };
            assert_eq!(contents(&array), expected, "{query}");
            assert_eq!((array.len(), array.dimensions()), (len, dimensions), "{query}");
            assert_eq!(array.has_nulls(), expected.contains(&None), "{query}");
            let present: Vec<_> = expected.iter().flatten().map(String::as_bytes).collect();
            assert_eq!(array.present().collect::<Vec<_>>(), present, "{query}");
        });
    }

    #[pg_test]
    fn arrays_are_read_as_postgresql_reads_them() {
        for (array, len, dimensions) in [
            ("'{}'", 0, 0),
            ("'{a}'", 1, 1),
            ("'{\"\"}'", 1, 1),
            ("'{a,bb,ccc,dddd,eeeee}'", 5, 1),
            ("'{NULL}'", 1, 1),
            ("'{NULL,NULL,x}'", 3, 1),
            ("'{a,NULL,ccc}'", 3, 1),
            ("'{a,b,NULL}'", 3, 1),
            ("'[5:6]={a,b}'", 2, 1),
            ("'{{a,b},{c,d},{e,f}}'", 6, 2),
            ("'{{a,NULL},{NULL,d}}'", 4, 2),
            ("'{{{a},{b}}}'", 2, 3),
            ("'{äöü,☃,🔑}'", 3, 1),
            ("array_fill(NULL::text, '{20}')", 20, 1),
            ("(select array_agg(repeat('x', n)) from generate_series(0, 300) n)", 301, 1),
            (
                "(select array_agg(case when n % 3 > 0 then repeat('x', n) end) from generate_series(0, 63) n)",
                64,
                1,
            ),
            ("string_to_array(repeat('ab,', 20000) || 'c', ',')", 20_001, 1),
        ] {
            assert_read_alike(&format!("select {array}::text[], null::text"), len, dimensions);
        }
    }

    #[pg_test]
    fn arrays_are_read_however_they_are_stored() {
        for storage in ["plain", "main", "external", "extended"] {
            Spi::run(&format!(
                "create temp table stored (a text[]);
                 alter table stored alter column a set storage {storage};
                 insert into stored select array_agg(repeat(chr(97 + n % 26), 5) || n) from generate_series(1, 400) n;
                 insert into stored select array_agg(md5((n * 7)::text) || null) || array['x'] from generate_series(1, 90) n"
            ))
            .expect("a table");
            for_each("select a, null::text from stored where cardinality(a) = 400", |value, _| {
                // SAFETY: a text[], in place while the query is open.
                let array = TextArray::parse(unsafe { datum::varlena(value.expect("an array")) });
                assert_eq!(array.len(), 400);
                assert_eq!(array.iter().last().flatten(), Some(b"kkkkk400".as_slice()), "{storage}");
            });
            assert_read_alike("select a, null::text from stored where cardinality(a) = 91", 91, 1);
            if storage != "plain" {
                Spi::run("insert into stored select array_agg(md5(n::text)) from generate_series(1, 3000) n")
                    .expect("a large array");
                assert_read_alike("select a, null::text from stored where cardinality(a) = 3000", 3000, 1);
            }
            Spi::run("drop table stored").expect("a drop");
        }
    }

    #[pg_test]
    fn texts_are_read_however_they_are_stored() {
        for storage in ["main", "external", "extended"] {
            Spi::run(&format!(
                "create temp table stored (t text);
                 alter table stored alter column t set storage {storage};
                 insert into stored select repeat('ä', n) from unnest(array[0, 1, 62, 63, 64, 126, 127, 128]) n;
                 insert into stored select repeat('ab', 30000);
                 insert into stored select string_agg(md5(n::text), '') from generate_series(1, 3000) n"
            ))
            .expect("a table");
            for_each("select t, t || '' from stored", |value, text| {
                // SAFETY: a text, in place while the query is open.
                let content = unsafe { datum::varlena(value.expect("a text")) };
                assert_eq!(content, text.expect("a text").as_bytes(), "{storage}");
            });
            Spi::run("drop table stored").expect("a drop");
        }
    }

    #[pg_test]
    fn addresses_and_networks_are_read_as_postgresql_prints_them() {
        let addresses = "
            select a, host(a) || '/' || masklen(a)
            from unnest('{0.0.0.0,0.0.0.0/0,10.0.0.0/8,10.1.2.3/8,192.0.2.1,255.255.255.255,
                          ::,::/0,::1,2001:db8::1,2001:db8::/32,2001:db8:0:1::ff/65,ffff::/1}'::inet[]) a";
        let networks = "
            select n::cidr, host(n) || '/' || masklen(n)
            from unnest('{0.0.0.0/0,10.0.0.0/8,192.0.2.1/32,::/0,2001:db8::/32,2001:db8::1/128}'::cidr[]) n";
        for query in [addresses, networks] {
            for_each(query, |value, text| {
                // SAFETY: an inet or cidr, in place while the query is open.
                let net =
                    datum::net(unsafe { datum::varlena(value.expect("an address")) }).expect("a network");
                assert_eq!(format!("{}/{}", net.addr(), net.bits()), text.expect("a text"));
            });
        }
        // By the rules of `Net`, which has its own tests.
        for_each("select '::ffff:192.0.2.1'::inet, null::text", |value, _| {
            // SAFETY: as above.
            let net = datum::net(unsafe { datum::varlena(value.expect("an address")) });
            assert_eq!(net, Net::v4([192, 0, 2, 1], 32));
        });
        for malformed in
            [&[][..], &[2], &[2, 32], &[2, 32, 1, 2, 3], &[2, 33, 1, 2, 3, 4], &[4, 0, 1, 2, 3, 4]]
        {
            assert_eq!(datum::net(malformed), None);
        }
    }

    #[pg_test]
    fn a_short_text_is_a_text() {
        static EMPTY: [u8; 24] = datum::short_text("");
        static CODE: [u8; 24] = datum::short_text("INSUFFICIENT_SCOPE");
        for (value, expected) in [(&EMPTY, ""), (&CODE, "INSUFFICIENT_SCOPE")] {
            // SAFETY: made to be a text.
            let text = unsafe { String::from_datum(Datum::from(value.as_ptr()), false) };
            assert_eq!(text.as_deref(), Some(expected));
        }
    }
}
