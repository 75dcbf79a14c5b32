//! docs/reference.md is complete, names nothing that does not exist, and its examples run and answer as shown.

use crate::document;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::common::{Shared, error};
use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use tollgate_core::status::Code;
use tollgate_tests::Cluster;

static SHARED: Shared = Shared::new(&[]);

const REFERENCE: &str = include_str!("../../../docs/reference.md");

/// Who may call what, in the reference's words, and the role that runs its examples.
const READERS: [(&str, &str, &str); 7] = [
    ("public", "everyone", "anyone"),
    ("verifier", "verifier", "web"),
    ("issuer", "issuer", "backend"),
    ("admin", "admin", "boss"),
    ("operator", "operator", "tollgated"),
    ("key_fetcher", "key_fetcher", "fetcher"),
    ("gateway", "gateway", "api"),
];

/// Signatures, as the reference writes them, of everything that is granted.
const SIGNATURES: &str = "
    with decided as (
        select d.given_to,
               case d.object_type when 'FUNCTION' then d.object::regprocedure end as function,
               case d.object_type when 'VIEW' then d.object::regclass
                                  when 'TYPE' then (select t.typrelid from pg_type t where t.oid = d.object::regtype) end as relation
          from tollgate.privilege_decisions d where d.given_to <> 'internal'
    )
    select d.given_to, p.proname::text as name,
           format('%s(%s) → %s', p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid)) as signature
      from decided d join pg_proc p on p.oid = d.function
    union all
    select d.given_to, c.relname,
           format('%s %s(%s)', case c.relkind when 'v' then 'view' else 'type' end, c.relname,
                  (select string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod), ', ' order by a.attnum)
                     from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped))
      from decided d join pg_class c on c.oid = d.relation
    union all
    select null, s.name,
           format('%s = %s%s (%s%s%s, set %s)', s.name, s.boot_val, s.unit, s.vartype,
                  ' from ' || s.min_val || ' to ' || s.max_val, ' of ' || array_to_string(s.enumvals, ', '),
                  case s.context when 'postmaster' then 'at server start' when 'sighup' then 'in the configuration'
                                 when 'superuser' then 'by superusers' when 'user' then 'by anyone' end)
      from pg_settings s where s.name like 'tollgate.%'";

/// The text under a heading, up to the next one.
#[derive(Debug, Default)]
struct Section<'a> {
    title: &'a str,
    /// The blocks without a language, each on one line.
    signatures: Vec<String>,
    /// `For: admin · Errors: 22023, 42704`
    facts: BTreeMap<&'a str, Vec<&'a str>>,
    /// The names in the first column of its table.
    rows: Vec<&'a str>,
    text: Vec<&'a str>,
}

impl<'a> Section<'a> {
    fn all() -> Vec<Self> {
        let mut sections = Vec::new();
        let mut lines = REFERENCE.lines();
        while let Some(line) = lines.next() {
            if let Some(title) = line.strip_prefix("## ").or_else(|| line.strip_prefix("### ")) {
                sections.push(Self { title, ..Self::default() });
            }
            let Some(section) = sections.last_mut() else { continue };
            section.text.push(line);
            if line == "```" {
                let block: Vec<&str> =
                    lines.by_ref().take_while(|line| *line != "```").map(str::trim).collect();
                section.signatures.push(block.join(" "));
            } else if line.starts_with("```") {
                section.text.extend(lines.by_ref().take_while(|line| *line != "```"));
                section.text.push("```");
            } else if line.starts_with("For: ") {
                section.facts = line
                    .split(" · ")
                    .filter_map(|fact| fact.split_once(": "))
                    .map(|(key, values)| (key, values.split(", ").map(|one| one.trim_matches('`')).collect()))
                    .collect();
            } else if let Some((name, _)) = line.strip_prefix("| `").and_then(|rest| rest.split_once('`')) {
                section.rows.push(name);
            }
        }
        sections
    }

    fn of(title: &str) -> Result<Self> {
        Self::all()
            .into_iter()
            .find(|section| section.title == title)
            .with_context(|| format!("no section {title}"))
    }

    fn fact(&self, key: &str) -> BTreeSet<&str> {
        self.facts.get(key).into_iter().flatten().copied().collect()
    }
}

/// Granted to, name and signature.
async fn catalogue(owner: &Client) -> Result<Vec<(Option<String>, String, String)>> {
    Ok(owner.query(SIGNATURES, &[]).await?.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

/// The project's files in a folder, at any depth, except tests.
fn sources(folder: &str) -> Result<String> {
    let mut text = String::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))? {
            let path = entry?.path();
            if path.file_stem().is_some_and(|stem| stem == "tests") {
                continue;
            } else if path.is_dir() {
                folders.push(path);
            } else {
                text.push_str(&fs::read_to_string(&path)?);
            }
        }
    }
    Ok(text)
}

/// The words that follow a mark in a text, which end where `is_part` says.
fn words_after<'a>(text: &'a str, mark: &str, is_part: fn(char) -> bool) -> BTreeSet<&'a str> {
    text.split(mark)
        .skip(1)
        .map(|rest| rest.split_once(|c| !is_part(c)).map_or(rest, |(word, _)| word))
        .filter(|word| !word.is_empty())
        .collect()
}

fn of_name(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'
}

/// The text between backticks outside blocks.
fn code_spans() -> Vec<&'static str> {
    let mut spans = Vec::new();
    let mut in_block = false;
    for line in REFERENCE.lines() {
        if line.starts_with("```") {
            in_block = !in_block;
        } else if !in_block {
            spans.extend(line.split('`').skip(1).step_by(2));
        }
    }
    spans
}

#[tokio::test]
async fn every_function_view_type_and_setting_is_listed_as_in_the_catalogue() -> Result<()> {
    let world = SHARED.world().await?;
    let there = catalogue(&world.owner).await?;
    let signatures: BTreeSet<String> = there.iter().map(|(_, _, signature)| signature.clone()).collect();
    let sections = Section::all();
    let documented: Vec<String> = sections.iter().flat_map(|section| section.signatures.clone()).collect();
    assert_eq!(documented.iter().cloned().collect::<BTreeSet<_>>(), signatures);
    assert_eq!(documented.len(), signatures.len(), "each is listed once");

    for (_, name, signature) in &there {
        let section = sections.iter().find(|section| section.signatures.contains(signature));
        let title = section.map(|section| section.title);
        assert!(title == Some(name) || signature.starts_with("type "), "{name} stands under {title:?}");
    }
    Ok(())
}

#[tokio::test]
async fn every_section_says_who_may_call_what_it_is_about() -> Result<()> {
    let world = SHARED.world().await?;
    let mut given: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for (given_to, _, signature) in catalogue(&world.owner).await? {
        let to = READERS.iter().find(|(decision, ..)| given_to.as_deref() == Some(*decision));
        given.entry(signature).or_default().extend(to.map(|(_, reader, _)| *reader));
    }
    for section in Section::all() {
        if let Some(signature) = section.signatures.first() {
            assert_eq!(Some(&section.fact("For")), given.get(signature), "{}", section.title);
        }
    }
    Ok(())
}

#[tokio::test]
async fn internal_objects_say_so_in_their_comments() -> Result<()> {
    let world = SHARED.world().await?;
    let rows = world
        .owner
        .query(
            "select d.object from tollgate.privilege_decisions d,
                    lateral (select case d.object_type when 'FUNCTION' then obj_description(d.object::regprocedure, 'pg_proc')
                                                       when 'VIEW' then obj_description(d.object::regclass, 'pg_class')
                                                       when 'TYPE' then obj_description(d.object::regtype, 'pg_type') end) o (comment)
              where (d.given_to = 'internal') is distinct from (o.comment ~ '\\mInternal[.:]')",
            &[],
        )
        .await?;
    let offenders: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert!(offenders.is_empty(), "comment and decision differ: {offenders:#?}");
    Ok(())
}

#[tokio::test]
async fn it_names_nothing_that_does_not_exist_or_is_internal() -> Result<()> {
    let world = SHARED.world().await?;
    let tables = Section::of("Tables")?.rows;
    let mut known: BTreeSet<String> = catalogue(&world.owner)
        .await?
        .into_iter()
        .map(|(_, name, _)| name.trim_start_matches("tollgate.").to_owned())
        .collect();
    known.extend(tables.iter().map(|table| table.trim_start_matches("tollgate.").to_owned()));
    for name in words_after(REFERENCE, "tollgate.", of_name) {
        assert!(known.contains(name), "tollgate.{name} is not there, or internal");
    }

    // Arguments, columns, keys of details, settings of PostgreSQL: their names are in the source.
    let source = sources("sql/schema")? + &sources("extension/src")?;
    let words: BTreeSet<&str> = source.split(|c| !of_name(c)).collect();
    for span in code_spans() {
        if span.contains('_') && !span.starts_with("pg_") && span.chars().all(of_name) {
            assert!(words.contains(span), "`{span}` occurs nowhere");
        }
    }
    Ok(())
}

#[tokio::test]
async fn every_table_has_its_row() -> Result<()> {
    let world = SHARED.world().await?;
    let rows = world
        .owner
        .query(
            "select 'tollgate.' || relname from pg_class
              where relnamespace = 'tollgate'::regnamespace and relkind in ('r', 'p')",
            &[],
        )
        .await?;
    let there: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let documented: BTreeSet<String> =
        Section::of("Tables")?.rows.iter().map(|&row| row.to_owned()).collect();
    assert_eq!(documented, there);
    Ok(())
}

#[test]
fn every_code_has_its_row_in_the_order_of_the_decision() -> Result<()> {
    assert_eq!(Section::of("Codes")?.rows, Code::ALL.map(Code::as_str));
    Ok(())
}

#[tokio::test]
async fn every_sqlstate_that_we_raise_has_its_row_and_no_other() -> Result<()> {
    let world = SHARED.world().await?;
    let (sql, rust) = (sources("sql/schema")?, sources("extension/src")?);
    let mut conditions: BTreeSet<String> =
        words_after(&sql, "ERRCODE = '", of_name).into_iter().map(str::to_owned).collect();
    // RAISE condition; but not RAISE EXCEPTION and similar forms.
    conditions.extend(words_after(&sql, "RAISE ", of_name).into_iter().map(str::to_owned));
    let of_constant = |c: char| c.is_ascii_uppercase() || c == '_';
    for constant in words_after(&rust, "PgSqlErrorCode::ERRCODE_", of_constant) {
        conditions.insert(constant.trim_start_matches("T_R_").to_lowercase());
    }
    assert!(conditions.len() > 10, "the source was not found");
    // Used by a NOTICE.
    conditions.remove("successful_completion");

    let mut raised = BTreeSet::new();
    for condition in &conditions {
        let attempt = format!("do $$ begin raise exception 'ours' using errcode = '{condition}'; end $$");
        let error = error(world.owner.batch_execute(&attempt).await);
        assert_eq!(error.message(), "ours", "{condition} is no condition");
        raised.insert(error.code().code().to_owned());
    }
    let documented = Section::of("Raised by Tollgate")?.rows;
    assert_eq!(documented.iter().map(|&row| row.to_owned()).collect::<BTreeSet<_>>(), raised);

    let sections = Section::all();
    let claimed: BTreeSet<&str> = sections.iter().flat_map(|section| section.fact("Errors")).collect();
    // An internal error, what CREATE EXTENSION raises, what only the server's log has, and a warning at COMMIT.
    let of_functions: BTreeSet<&str> = documented
        .into_iter()
        .filter(|code| !["XX000", "0A000", "58030", "25P01", "F0000"].contains(code))
        .collect();
    assert_eq!(claimed, of_functions, "what the functions are said to raise");
    Ok(())
}

#[test]
fn every_event_has_its_row_and_no_other() -> Result<()> {
    let source =
        sources("sql/schema")? + &sources("extension/src/api")? + &sources("extension/src/sessions")?;
    let is_event = |text: &&str| {
        text.split_once('.').is_some_and(|(object, verb)| {
            !["tollgate", "pgaudit", "auto_explain"].contains(&object)
                && [object, verb].iter().all(|one| one.len() > 2)
                && object.chars().all(|c| c.is_ascii_lowercase() || c == '_')
                && verb.chars().all(|c| c.is_ascii_lowercase() || c == '_')
        })
    };
    let written: BTreeSet<&str> = source.split(['\'', '"']).filter(is_event).collect();
    let documented: BTreeSet<&str> = Section::of("Events")?.rows.into_iter().collect();
    assert_eq!(documented, written);

    let sections = Section::all();
    let claimed: BTreeSet<&str> = sections.iter().flat_map(|section| section.fact("Events")).collect();
    assert_eq!(claimed, documented, "what the functions are said to write");
    Ok(())
}

#[test]
fn every_section_has_an_example_of_what_it_is_about() {
    for section in Section::all().iter().filter(|section| !section.signatures.is_empty()) {
        let text = section.text.join("\n");
        let name = format!("tollgate.{}", section.title.trim_start_matches("tollgate."));
        assert!(
            document::blocks(&text, "sql").iter().any(|block| block.contains(&name)),
            "no example of {name}"
        );
    }
}

#[test]
fn its_examples_run_and_answer_as_it_shows() -> Result<()> {
    let cluster = Cluster::start()?;
    let mut scripts = Vec::new();
    let introduction = REFERENCE.split("\n## ").next().unwrap_or_default();
    scripts.extend(document::blocks(introduction, "sql").into_iter().map(str::to_owned));
    for section in Section::all() {
        let reader = section.facts.get("For").and_then(|to| to.first());
        let role =
            READERS.iter().find(|(_, name, _)| Some(name) == reader).map_or("postgres", |(.., role)| role);
        let text = section.text.join("\n");
        let blocks = document::blocks(&text, "sql").into_iter();
        scripts.extend(blocks.map(|block| format!("\\c - {role}\n{block}")));
    }
    assert_eq!(scripts.len(), document::blocks(REFERENCE, "sql").len());

    let answers = document::run(&cluster, scripts.iter().map(String::as_str))?;
    assert_eq!(answers.len(), scripts.len());
    for (script, answer) in scripts.iter().zip(&answers) {
        document::assert_answered(script, answer);
    }
    for line in document::blocks(REFERENCE, "log").iter().flat_map(|block| block.lines()) {
        assert!(cluster.log().contains(line), "not in the server's log: {line}");
    }
    Ok(())
}

#[test]
fn its_links_have_targets() {
    let anchors: BTreeSet<String> = REFERENCE
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-").replace('.', ""))
        .collect();
    for anchor in words_after(REFERENCE, "](#", |c| c != ')') {
        assert!(anchors.contains(anchor), "nothing is at #{anchor}");
    }
}
