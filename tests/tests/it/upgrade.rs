//! Upgrades. `make freeze` keeps the install script of a release in sql/install, and each release adds the upgrade from
//! the previous one in sql/upgrade: updating leads to the same objects as a fresh installation. Before the first
//! release there is nothing to compare; to show that the comparison works, it is tried on a made-up release.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::common::{not_run, value};
use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use tollgate_tests::{Cluster, DATABASE, Install};

const CURRENT: &str = env!("CARGO_PKG_VERSION");

/// The first PostgreSQL with `extension_control_path`.
const HAS_CONTROL_PATH: u32 = 18;

/// The additions of the made-up next release: statements, each with the name that it creates for later ones, if any.
const ADDITIONS: &[(Option<&str>, &str)] = &[
    (
        Some("gates"),
        "CREATE TABLE tollgate.gates (id bigint GENERATED ALWAYS AS IDENTITY, name text NOT NULL)",
    ),
    (None, "COMMENT ON TABLE tollgate.gates IS 'Of a test'"),
    (None, "SELECT pg_extension_config_dump('tollgate.gates', '')"),
    (None, "GRANT SELECT ON tollgate.gates TO pg_monitor"),
    (Some("opened"), "ALTER TABLE tollgate.api_tokens ADD COLUMN opened bigint NOT NULL DEFAULT 1"),
    (None, "COMMENT ON COLUMN tollgate.api_tokens.opened IS 'Of a test'"),
    (None, "CREATE INDEX api_tokens_gate ON tollgate.api_tokens (opened)"),
    (None, "ALTER TABLE tollgate.api_tokens ADD CONSTRAINT a_gate CHECK (opened > 0)"),
    (None, "ALTER TABLE tollgate.token_usage SET (fillfactor = 71)"),
    (
        Some("count_"),
        "CREATE FUNCTION tollgate.count_() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    ),
    (None, "ALTER FUNCTION tollgate.count_() SET search_path = pg_catalog, pg_temp"),
    (
        Some("count_each"),
        "CREATE TRIGGER count_each AFTER INSERT ON tollgate.api_tokens EXECUTE FUNCTION tollgate.count_()",
    ),
    (None, "ALTER TABLE tollgate.api_tokens ENABLE ALWAYS TRIGGER count_each"),
    (None, "CREATE OR REPLACE VIEW tollgate.tokens_of_a_test AS SELECT t.id FROM tollgate.api_tokens t"),
    (Some("numbers"), "CREATE SEQUENCE tollgate.numbers"),
    (None, "ALTER SEQUENCE tollgate.numbers MAXVALUE 9"),
];

/// Every object of the extension, by name, with all of its properties.
const OBJECTS: &str = "
    with member as (
        select d.classid, d.objid from pg_depend d join pg_extension e on e.oid = d.refobjid
         where e.extname = 'tollgate' and d.deptype = 'e'
    ), relation as (
        select c.* from member m join pg_class c on c.oid = m.objid where m.classid = 'pg_class'::regclass
    ), granted as (
        select 'relation' as kind, c.oid, a.* from relation c, aclexplode(c.relacl) a
        union all
        select 'function', p.oid, a.* from member m join pg_proc p on p.oid = m.objid and m.classid = 'pg_proc'::regclass,
            aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        union all
        select 'type', t.oid, a.* from member m join pg_type t on t.oid = m.objid and m.classid = 'pg_type'::regclass,
            aclexplode(coalesce(t.typacl, acldefault('T', t.typowner))) a
    )
    select 'member ' || i.type || ' ' || i.identity, coalesce(obj_description(m.objid, m.classid::regclass::text), '')
        from member m, pg_identify_object(m.classid, m.objid, 0) i
    union all
    select 'column ' || c.oid::regclass || '.' || a.attname,
           concat_ws(' ', a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                     a.attstorage, a.attcollation::regcollation, pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum))
        from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
        where c.relnamespace = 'tollgate'::regnamespace and c.relkind <> 'i'
    union all
    select 'relation ' || c.oid::regclass, concat_ws(' ', c.relkind, c.relpersistence, c.reloptions, am.amname, c.relrowsecurity, c.relforcerowsecurity)
        from relation c left join pg_am am on am.oid = c.relam
    union all
    select 'sequence ' || s.seqrelid::regclass, concat_ws(' ', s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle)
        from pg_class c join pg_sequence s on s.seqrelid = c.oid where c.relnamespace = 'tollgate'::regnamespace
    union all
    select 'view ' || c.oid::regclass, pg_get_viewdef(c.oid) from relation c where c.relkind = 'v'
    union all
    select 'index ' || x.indexrelid::regclass, pg_get_indexdef(x.indexrelid) from relation c join pg_index x on x.indrelid = c.oid
    union all
    select 'constraint ' || c.oid::regclass || '.' || k.conname, pg_get_constraintdef(k.oid) from relation c join pg_constraint k on k.conrelid = c.oid
    union all
    select 'trigger ' || c.oid::regclass || '.' || t.tgname, t.tgenabled::text || ' ' || pg_get_triggerdef(t.oid)
        from relation c join pg_trigger t on t.tgrelid = c.oid and not t.tgisinternal
    union all
    select 'function ' || p.oid::regprocedure, pg_get_functiondef(p.oid)
        from member m join pg_proc p on p.oid = m.objid and m.classid = 'pg_proc'::regclass
    union all
    select 'privileges ' || g.kind || ' ' || case g.kind when 'relation' then g.oid::regclass::text when 'function' then g.oid::regprocedure::text else g.oid::regtype::text end,
           string_agg(case g.grantee when 0 then 'PUBLIC' else g.grantee::regrole::text end || ' ' || g.privilege_type, ', ' order by g.grantee, g.privilege_type)
        from granted g group by g.kind, g.oid
    union all
    select 'dumped ' || c.id::regclass, c.condition from pg_extension e, unnest(e.extconfig, e.extcondition) c (id, condition) where e.extname = 'tollgate'
    union all
    select 'schema', nspacl::text from pg_namespace where nspname = 'tollgate'";

async fn objects(client: &Client) -> Result<BTreeMap<String, String>> {
    let rows = client.query(OBJECTS, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get::<_, Option<String>>(1).unwrap_or_default())).collect())
}

/// Both as lines, so that each difference is one line of the failure.
fn differences(ours: &BTreeMap<String, String>, theirs: &BTreeMap<String, String>) -> Vec<String> {
    ours.keys()
        .chain(theirs.keys())
        .filter(|name| ours.get(*name) != theirs.get(*name))
        .map(|name| format!("{name}:\n  {:?}\n  {:?}", ours.get(name), theirs.get(name)))
        .collect()
}

/// A database with the extension in the installed version, unless another is given.
async fn database(cluster: &Cluster, name: &str, version: Option<&str>) -> Result<Client> {
    cluster.execute(DATABASE, &format!("create database {name}"))?;
    let version = version.map(|version| format!("version '{version}'")).unwrap_or_default();
    cluster.execute(name, &format!("create extension tollgate {version}"))?;
    cluster.connect("postgres", name).await
}

async fn update(client: &Client, version: &str) -> Result<()> {
    client.batch_execute(&format!("alter extension tollgate update to '{version}'")).await?;
    let extension = "select extversion from pg_extension where extname = 'tollgate'";
    anyhow::ensure!(value::<String>(client, extension).await? == version);
    Ok(())
}

/// The releases whose install scripts are kept, with the scripts.
fn releases() -> Result<Vec<(String, String)>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sql/install");
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut releases = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let stem = path.file_stem().context("a name")?.to_string_lossy().into_owned();
        let version = stem.strip_prefix("tollgate--").with_context(|| stem.clone())?.to_owned();
        releases.push((version, fs::read_to_string(path)?));
    }
    Ok(releases)
}

fn install_script() -> Result<String> {
    let path = Install::under_test()?.extension_dir().join(format!("tollgate--{CURRENT}.sql"));
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

#[tokio::test]
async fn updating_any_release_gives_what_a_fresh_installation_has() -> Result<()> {
    let earlier = releases()?.into_iter().filter(|(version, _)| version != CURRENT).collect::<Vec<_>>();
    if earlier.is_empty() {
        not_run("no earlier release has its install script in sql/install");
        return Ok(());
    }
    let cluster = Cluster::start()?;
    let fresh = objects(&cluster.connect("postgres", DATABASE).await?).await?;
    for (n, (version, _)) in earlier.iter().enumerate() {
        let updated = database(&cluster, &format!("updated_{n}"), Some(version)).await?;
        update(&updated, CURRENT).await?;
        let differences = differences(&fresh, &objects(&updated).await?);
        assert!(differences.is_empty(), "fresh, then updated from {version}:\n{}", differences.join("\n"));
    }
    Ok(())
}

#[test]
fn the_install_script_of_this_release_is_frozen() -> Result<()> {
    let Some((_, frozen)) = releases()?.into_iter().find(|(version, _)| version == CURRENT) else {
        not_run(&format!("{CURRENT} is not released: sql/install has no script of it"));
        return Ok(());
    };
    assert!(
        statements(&frozen) == statements(&install_script()?),
        "the schema is not that of {CURRENT} any more: raise the version and write sql/upgrade/tollgate--{CURRENT}--….sql"
    );
    Ok(())
}

/// A folder of extensions with this version, the next one, the upgrade, and for each addition an upgrade that omits it.
fn made_up_releases() -> Result<tempfile::TempDir> {
    let scratch = tempfile::tempdir()?;
    let folder = scratch.path().join("extension");
    fs::create_dir(&folder)?;
    for directory in [scratch.path(), &folder] {
        // The server runs as another user.
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    }
    let present = install_script()?;
    let control = Install::under_test()?.extension_dir().join("tollgate.control");
    fs::copy(control, folder.join("tollgate.control"))?;
    let write = |name: &str, text: &str| fs::write(folder.join(format!("tollgate--{name}.sql")), text);
    let script = |forgotten: Option<usize>| {
        let gone = forgotten.and_then(|n| ADDITIONS[n].0);
        let mut script = String::new();
        for (n, (_, statement)) in ADDITIONS.iter().enumerate() {
            if Some(n) != forgotten && !gone.is_some_and(|name| statement.contains(name)) {
                script += &format!("{statement};\n");
            }
        }
        script + "SELECT tollgate.settle_privileges();\n"
    };
    write(CURRENT, &present)?;
    write("next", &format!("{present}\n{}", script(None)))?;
    write(&format!("{CURRENT}--next"), &script(None))?;
    for n in 0..ADDITIONS.len() {
        write(&format!("{CURRENT}--without{n}"), &script(Some(n)))?;
    }
    Ok(scratch)
}

#[tokio::test]
async fn whatever_an_upgrade_script_forgets_is_found() -> Result<()> {
    if Install::under_test()?.major < HAS_CONTROL_PATH {
        // There the made-up releases would have to be written into the installation, which other tests use meanwhile. What is
        // compared comes from the same queries on each version.
        not_run("before PostgreSQL 18 a server looks for extensions among its own files only");
        return Ok(());
    }
    let scratch = made_up_releases()?;
    let cluster = Cluster::builder()
        .setting("extension_control_path", &format!("{}:$system", scratch.path().display()))
        .start()?;
    let fresh = objects(&database(&cluster, "fresh", Some("next")).await?).await?;
    let updated = database(&cluster, "updated", None).await?;
    let before = objects(&updated).await?;
    update(&updated, "next").await?;
    let after = differences(&fresh, &objects(&updated).await?);
    assert!(after.is_empty(), "fresh, then updated:\n{}", after.join("\n"));
    assert!(differences(&fresh, &before).len() >= ADDITIONS.len(), "{:?}", differences(&fresh, &before));
    for (n, (_, forgotten)) in ADDITIONS.iter().enumerate() {
        let updated = database(&cluster, &format!("forgetful_{n}"), None).await?;
        update(&updated, &format!("without{n}")).await?;
        assert!(!differences(&fresh, &objects(&updated).await?).is_empty(), "not found: {forgotten}");
    }
    Ok(())
}

/// The generated script without comments about its sources.
fn statements(script: &str) -> String {
    let mut text = String::new();
    let mut rest = script;
    while let Some((before, after)) = rest.split_once("/*") {
        text.push_str(before);
        rest = after.split_once("*/").map_or("", |(_, after)| after);
    }
    text.push_str(rest);
    text.lines()
        .filter(|line| !line.starts_with("-- extension/"))
        .filter(|line| !line.trim().is_empty())
        .collect::<Vec<_>>()
        .join("\n")
}
