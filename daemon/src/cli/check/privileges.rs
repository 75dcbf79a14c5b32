//! What our role may do: which capabilities it has, whole or in part, and the grant that is missing.
//!
//! A daemon needs `operator`. An application may run the check as its own role, which has others: of these a part is worth a
//! warning, since a call will fail some day; and what only an operator may look at is left out.

use tokio_postgres::Client;

use super::finding::Finding;
use crate::contract;
use crate::contract::{Held, OwnCapability};
use crate::error::{Doing as _, Result};

const NAME: &str = "privileges";

pub(super) struct Privileges {
    schema: bool,
    /// `None`: there is no such view.
    daemons_view: Option<bool>,
    /// `None` where they cannot be asked for, without the schema or in an older one.
    capabilities: Option<Vec<OwnCapability>>,
}

impl Privileges {
    pub(super) async fn ask(client: &Client) -> Result<Self> {
        const DOING: &str = "look up privileges";
        let row = client
            .query_one(
                "select coalesce((select has_schema_privilege(n.oid, 'usage') from pg_namespace n \
                                  where n.nspname = 'tollgate'), false), \
                        (select has_table_privilege(c.oid, 'select') from pg_class c \
                         join pg_namespace n on n.oid = c.relnamespace \
                         where n.nspname = 'tollgate' and c.relname = 'daemons'), \
                        exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace \
                                where n.nspname = 'tollgate' and p.proname = 'list_own_capabilities' \
                                  and has_function_privilege(p.oid, 'execute'))",
                &[],
            )
            .await
            .doing(DOING)?;
        let schema = row.try_get(0).doing(DOING)?;
        let capabilities = match schema && row.try_get(2).doing(DOING)? {
            true => Some(contract::own_capabilities(client).await?),
            false => None,
        };
        Ok(Self { schema, daemons_view: row.try_get(1).doing(DOING)?, capabilities })
    }

    /// Whether the role may do all that the daemon does, as far as the extension in this database has it.
    pub(super) fn are_those_of_the_daemon(&self) -> bool {
        self.schema && self.of("operator").is_some_and(|operator| operator.held == Held::Whole)
    }

    /// The functions and views that the extension in this database does not have.
    fn absent(&self) -> Vec<&str> {
        let mut absent = Vec::new();
        if self.schema && self.capabilities.is_none() {
            absent.push("list_own_capabilities()");
        }
        if self.daemons_view.is_none() {
            absent.push("daemons");
        }
        absent
    }

    fn of(&self, name: &str) -> Option<&OwnCapability> {
        self.capabilities.iter().flatten().find(|capability| capability.name == name)
    }

    /// The names of the capabilities of which the role has so much, but for the daemon's.
    fn others(&self, held: Held) -> Vec<&OwnCapability> {
        let all = self.capabilities.iter().flatten();
        all.filter(|capability| capability.name != "operator" && capability.held == held).collect()
    }

    pub(super) fn findings(&self, role: &str) -> Vec<Finding> {
        let mut findings = Vec::new();
        let absent = self.absent();
        if !absent.is_empty() {
            findings.push(Finding::fail(
                "functions",
                format!("the extension in this database has no {}", absent.join(", ")),
                "ALTER EXTENSION tollgate UPDATE; or use a tollgated of the extension's version",
            ));
        }
        findings.push(self.of_the_daemon(role));
        findings.extend(self.others(Held::Partly).into_iter().map(|partly| {
            Finding::warn(
                NAME,
                format!(
                    "{role} has {} only in part: it may not use {}",
                    partly.name,
                    partly.missing.join(", ")
                ),
                grant(role, &partly.name),
            )
        }));
        findings
    }

    fn of_the_daemon(&self, role: &str) -> Finding {
        let whole: Vec<&str> =
            self.others(Held::Whole).into_iter().map(|capability| capability.name.as_str()).collect();
        if self.are_those_of_the_daemon() {
            let more =
                if whole.is_empty() { String::new() } else { format!("; it has {} too", whole.join(", ")) };
            return Finding::ok(NAME, format!("{role} may do all that the daemon does (operator){more}"));
        }
        let operator = self.of("operator");
        let is_an_applications = operator.is_some_and(|operator| operator.held == Held::Not)
            && !(whole.is_empty() && self.others(Held::Partly).is_empty());
        if is_an_applications {
            let has = if whole.is_empty() { "no capability as a whole".to_owned() } else { whole.join(", ") };
            return Finding::warn(
                NAME,
                format!(
                    "{role} has {has}, and is no role for the daemon: what only an operator may look at was left out"
                ),
                "tollgated check (as the role of the daemon, which has the capability operator)",
            );
        }
        let mut grants = Vec::new();
        if !self.schema {
            grants.push(format!("GRANT USAGE ON SCHEMA tollgate TO {role};"));
        }
        if operator.map_or(!self.schema, |operator| operator.held != Held::Whole) {
            grants.push(grant(role, "operator"));
        }
        let detail = match operator {
            Some(OwnCapability { held: Held::Partly, missing, .. }) => {
                format!(
                    "{role} has operator, which the daemon needs, only in part: it may not use {}",
                    missing.join(", ")
                )
            }
            _ => format!("{role} lacks privileges that the daemon needs (operator)"),
        };
        Finding::fail(NAME, detail, grants.join("\n"))
    }
}

fn grant(role: &str, capability: &str) -> String {
    format!("SELECT tollgate.grant_capability('{}', '{capability}');", role.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::finding::Verdict;

    const ROLE: &str = "\"My role\"";

    /// A role that may use the schema, and has so much of verifier, issuer, admin and operator.
    fn with(held: [Held; 4]) -> Privileges {
        let names = ["verifier", "issuer", "admin", "operator"];
        let capabilities = names.iter().zip(held).map(|(name, held)| OwnCapability {
            name: (*name).to_owned(),
            held,
            missing: if held == Held::Whole { Vec::new() } else { vec![format!("tollgate.of_{name}()")] },
        });
        let capabilities = Some(capabilities.collect());
        let may = held[3] == Held::Whole;
        Privileges { schema: true, daemons_view: Some(may), capabilities }
    }

    fn only(privileges: &Privileges) -> Finding {
        let mut findings = privileges.findings(ROLE);
        assert_eq!(findings.len(), 1, "{findings:?}");
        findings.remove(0)
    }

    #[test]
    fn missing_privileges_are_printed_as_the_statements_that_give_them() {
        let privileges = Privileges { schema: false, daemons_view: Some(false), capabilities: None };
        let finding = only(&privileges);
        assert_eq!(finding.verdict, Verdict::Fail);
        assert_eq!(
            finding.remedy.as_deref().unwrap().lines().collect::<Vec<_>>(),
            [
                "GRANT USAGE ON SCHEMA tollgate TO \"My role\";",
                "SELECT tollgate.grant_capability('\"My role\"', 'operator');",
            ]
        );
        assert!(!privileges.are_those_of_the_daemon());
    }

    #[test]
    fn functions_that_the_extension_does_not_have_are_named() {
        let privileges = Privileges { schema: true, daemons_view: None, capabilities: None };
        let findings = privileges.findings("d");
        assert!(
            findings[0].detail.contains("list_own_capabilities") && findings[0].detail.contains("daemons")
        );
        assert_eq!(findings[0].verdict, Verdict::Fail);
    }

    #[test]
    fn a_role_with_all_that_the_daemon_needs_is_fine_whatever_else_it_has() {
        use Held::*;
        let finding = only(&with([Not, Not, Not, Whole]));
        assert_eq!(finding.verdict, Verdict::Ok);
        assert!(finding.detail.contains("all that the daemon does"), "{}", finding.detail);
        let finding = only(&with([Whole, Whole, Not, Whole]));
        assert!(finding.detail.ends_with("it has verifier, issuer too"), "{}", finding.detail);
    }

    #[test]
    fn a_part_of_a_capability_is_named_with_what_is_missing_and_its_own_grant() {
        use Held::*;
        for (held, name) in [
            ([Partly, Not, Not, Not], "verifier"),
            ([Whole, Partly, Not, Not], "issuer"),
            ([Whole, Whole, Partly, Not], "admin"),
            ([Whole, Partly, Not, Whole], "issuer"),
        ] {
            let findings = with(held).findings(ROLE);
            assert_eq!(findings.len(), 2, "{findings:?}");
            let finding = &findings[1];
            assert_eq!(finding.verdict, Verdict::Warn);
            assert!(
                finding.detail.contains(&format!("{name} only in part: it may not use tollgate.of_{name}()"))
            );
            assert_eq!(
                finding.remedy.as_deref(),
                Some(format!("SELECT tollgate.grant_capability('\"My role\"', '{name}');").as_str())
            );
            // An application's role is not asked to be an operator.
            assert!(
                !findings[0].remedy.as_deref().unwrap_or_default().contains("grant_capability"),
                "{findings:?}"
            );
        }
        let finding = only(&with([Not, Not, Not, Partly]));
        assert_eq!(finding.verdict, Verdict::Fail);
        assert!(finding.detail.contains("tollgate.of_operator()"), "{}", finding.detail);
        assert!(finding.remedy.unwrap().contains("'operator'"));
    }

    #[test]
    fn an_applications_role_is_reported_as_none_for_the_daemon() {
        use Held::*;
        let finding = only(&with([Whole, Whole, Not, Not]));
        assert_eq!(finding.verdict, Verdict::Warn);
        assert!(
            finding.detail.contains("has verifier, issuer, and is no role for the daemon"),
            "{}",
            finding.detail
        );
        assert_eq!(only(&with([Not; 4])).verdict, Verdict::Fail);
    }
}
