-- Who may use what: the decision about each object, in one place. grant_capability, the privileges of an installation and of
-- an upgrade, and the tests all read it here; an object that is not decided about fails the tests by its name.

CREATE VIEW tollgate.privilege_decisions AS
    SELECT d.object_type, 'tollgate.' || d.object AS object, d.given_to
    FROM (VALUES
        -- Everyone: what discloses nothing but the caller's own context and arguments.
        ('FUNCTION', 'client_ip_from(text, cidr[])',                          'public'),
        ('FUNCTION', 'current_scopes()',                                      'public'),
        ('FUNCTION', 'current_token_id()',                                    'public'),
        ('FUNCTION', 'current_user_id()',                                     'public'),
        ('FUNCTION', 'list_own_capabilities()',                               'public'),
        ('FUNCTION', 'require_scope(text)',                                   'public'),
        ('FUNCTION', 'scope_grants(text[], text)',                            'public'),
        ('FUNCTION', 'token_has_all_scopes(text[])',                          'public'),
        ('FUNCTION', 'token_has_any_scope(text[])',                           'public'),
        ('FUNCTION', 'token_has_scope(text)',                                 'public'),

        -- Verifies, acts for a token, and ends what it is shown.
        ('FUNCTION', 'authenticate(text, text[], inet)',                      'verifier'),
        ('FUNCTION', 'last_refusal()',                                        'verifier'),
        ('FUNCTION', 'revoke_own_api_token(uuid, text)',                      'verifier'),
        ('FUNCTION', 'revoke_presented_token(text, text, inet)',              'verifier'),
        ('FUNCTION', 'token_has_scope(text, text, inet)',                     'verifier'),
        ('FUNCTION', 'verify_api_token(text, text[], inet)',                  'verifier'),
        ('FUNCTION', 'verify_api_token_hash(bytea, text[], inet)',            'verifier'),
        ('TYPE',     'verification',                                          'verifier'),

        -- Has tokens come and go.
        ('FUNCTION', 'create_api_token(text, text, text[], interval, jsonb, cidr[], integer, interval, text, timestamptz)', 'issuer'),
        ('FUNCTION', 'derive_api_token(text, text, text[], interval, cidr[], inet, timestamptz)', 'issuer'),
        ('FUNCTION', 'import_api_token(text, text, bytea, text[], interval, jsonb, cidr[], integer, interval, text, timestamptz, timestamptz, timestamptz, timestamptz, timestamptz)', 'issuer'),
        ('FUNCTION', 'list_api_tokens(text, integer, uuid)',                  'issuer'),
        ('FUNCTION', 'list_scopes()',                                         'issuer'),
        ('FUNCTION', 'revoke_all_api_tokens(text, text)',                     'issuer'),
        ('FUNCTION', 'revoke_api_token(uuid, text, text)',                    'issuer'),
        ('FUNCTION', 'rotate_api_token(uuid, interval, interval, timestamptz, boolean)', 'issuer'),
        ('FUNCTION', 'set_api_token_enabled(uuid, boolean, text)',            'issuer'),
        ('FUNCTION', 'token_activity(uuid, timestamptz)',                     'issuer'),
        ('TYPE',     'issued_token',                                          'issuer'),

        -- Manages what the others work with, and sees how it fares.
        ('FUNCTION', 'attach_users_table(regclass, name, boolean, text, text)', 'admin'),
        ('FUNCTION', 'define_scope(text, text)',                              'admin'),
        ('FUNCTION', 'define_webhook(text, text, text[])',                    'admin'),
        ('FUNCTION', 'deployment_health(interval)',                           'admin'),
        ('FUNCTION', 'detach_users_table(regclass)',                          'admin'),
        ('FUNCTION', 'drop_scope(text)',                                      'admin'),
        ('FUNCTION', 'drop_subscription(text)',                               'admin'),
        ('FUNCTION', 'drop_webhook(text)',                                    'admin'),
        ('FUNCTION', 'find_api_tokens(text, text, text, text, integer, uuid)', 'admin'),
        ('FUNCTION', 'grant_capability(regrole, text)',                       'admin'),
        ('FUNCTION', 'list_capability_grants()',                              'admin'),
        ('FUNCTION', 'list_users_tables()',                                   'admin'),
        ('FUNCTION', 'pause_webhook(text)',                                  'admin'),
        ('FUNCTION', 'purge_audit_log(timestamptz, integer)',                 'admin'),
        ('FUNCTION', 'replay_webhook(text, bigint)',                          'admin'),
        ('FUNCTION', 'resume_webhook(text)',                                 'admin'),
        ('FUNCTION', 'revoke_capability(regrole, text)',                      'admin'),
        ('FUNCTION', 'rotate_webhook_secret(text, interval)',                 'admin'),
        ('FUNCTION', 'set_webhook_enabled(text, boolean)',                    'admin'),
        ('FUNCTION', 'set_webhook_url(text, text)',                          'admin'),
        ('FUNCTION', 'stats()',                                               'admin'),
        ('FUNCTION', 'subscription_backlogs(integer)',                        'admin'),
        ('FUNCTION', 'update_api_token(uuid, jsonb)',                         'admin'),
        ('FUNCTION', 'verify_audit_log(bigint, bytea)',                       'admin'),
        ('TYPE',     'audit_verification',                                    'admin'),
        ('VIEW',     'capability_grants',                                     'admin'),
        ('VIEW',     'capability_privileges',                                 'admin'),
        ('VIEW',     'daemons',                                               'admin'),
        ('VIEW',     'tokens',                                                'admin'),
        ('VIEW',     'webhook_deliveries',                                    'admin'),
        ('VIEW',     'webhooks',                                              'admin'),

        -- What the daemon needs, and nothing else.
        ('FUNCTION', 'ack_usage(bigint)',                                     'operator'),
        ('FUNCTION', 'acquire_leadership(text)',                              'operator'),
        ('FUNCTION', 'admit_event_reader(bytea, inet)',                       'operator'),
        ('FUNCTION', 'advance_subscription(text, tollgate.event_cursor)',     'operator'),
        ('FUNCTION', 'announce_expiries(interval, integer)',                  'operator'),
        ('FUNCTION', 'announce_expiries_after(interval, integer, timestamptz, uuid)', 'operator'),
        ('FUNCTION', 'apply_findings(tollgate.finding[])',                    'operator'),
        ('FUNCTION', 'apply_usage(text, uuid, bigint, tollgate.usage_row[], bytea)', 'operator'),
        ('FUNCTION', 'check_leadership(text, bigint)',                        'operator'),
        ('FUNCTION', 'claim_webhook_deliveries(integer, interval)',           'operator'),
        ('FUNCTION', 'deployment_health(interval)',                           'operator'),
        ('FUNCTION', 'drain_findings()',                                      'operator'),
        ('FUNCTION', 'drain_usage()',                                         'operator'),
        ('FUNCTION', 'event_position(bigint)',                                'operator'),
        ('FUNCTION', 'expire_tokens(integer)',                                'operator'),
        ('FUNCTION', 'expire_tokens_after(integer, timestamptz, uuid)',       'operator'),
        ('FUNCTION', 'finish_webhook_delivery(bigint, uuid, integer, text, interval)', 'operator'),
        ('FUNCTION', 'has_events(tollgate.event_cursor)',                     'operator'),
        ('FUNCTION', 'open_subscription(text)',                               'operator'),
        ('FUNCTION', 'purge_audit_log(timestamptz, integer)',                 'operator'),
        ('FUNCTION', 'purge_tokens(interval, integer)',                       'operator'),
        ('FUNCTION', 'purge_tokens_after(interval, integer, timestamptz, uuid)', 'operator'),
        ('FUNCTION', 'purge_webhook_deliveries(interval, integer)',           'operator'),
        ('FUNCTION', 'queue_webhook_deliveries(integer)',                     'operator'),
        ('FUNCTION', 'purge_usage(interval, integer)',                        'operator'),
        ('FUNCTION', 'purge_usage_after(interval, integer, timestamptz, uuid)', 'operator'),
        ('FUNCTION', 'read_events(tollgate.event_cursor, integer)',           'operator'),
        ('FUNCTION', 'report_daemon(uuid, text, integer, text, timestamptz, jsonb)', 'operator'),
        ('FUNCTION', 'seal_audit_log(integer)',                               'operator'),
        ('FUNCTION', 'stats()',                                               'operator'),
        ('FUNCTION', 'subscription_backlogs(integer)',                        'operator'),
        ('FUNCTION', 'usage_applied(text, uuid, bigint)',                     'operator'),
        ('FUNCTION', 'usage_pressure()',                                      'operator'),
        ('TYPE',     'event_batch',                                           'operator'),
        ('TYPE',     'event_cursor',                                          'operator'),
        ('TYPE',     'finding',                                               'operator'),
        ('TYPE',     'usage_row',                                             'operator'),
        ('TYPE',     'webhook_message',                                       'operator'),
        ('VIEW',     'daemons',                                               'operator'),
        ('VIEW',     'webhooks',                                              'operator'),

        -- Nobody: what the others are made of. Tables and sequences are nobody's without being named here.
        ('FUNCTION', 'acting_role()',                                         'nobody'),
        ('FUNCTION', 'advance_sequence(regclass, bigint)',                   'nobody'),
        ('FUNCTION', 'ancestors(uuid)',                                       'nobody'),
        ('FUNCTION', 'append_seal(tollgate.audit_seals)',                     'nobody'),
        ('FUNCTION', 'advise_on_users_table(regclass, smallint, text)',       'nobody'),
        ('FUNCTION', 'attach_trigger(regclass, name, text, text, name, text[])', 'nobody'),
        ('FUNCTION', 'attached_users_tables()',                               'nobody'),
        ('FUNCTION', 'begin_batch(tollgate.event_cursor)',                    'nobody'),
        ('FUNCTION', 'capability_acls(text)',                                 'nobody'),
        ('FUNCTION', 'capability_objects(text)',                              'nobody'),
        ('FUNCTION', 'carrying_signature(text, bytea[])',                     'nobody'),
        ('FUNCTION', 'change_webhook_backlog(text, bigint, bigint, bigint, timestamptz)', 'nobody'),
        ('FUNCTION', 'check_batch_size(integer, integer)',                    'nobody'),
        ('FUNCTION', 'check_capability(regrole, text)',                       'nobody'),
        ('FUNCTION', 'check_cursor(tollgate.event_cursor)',                   'nobody'),
        ('FUNCTION', 'check_event_count(integer)',                            'nobody'),
        ('FUNCTION', 'check_json(text, jsonb, integer, integer)',             'nobody'),
        ('FUNCTION', 'check_page_size(integer)',                              'nobody'),
        ('FUNCTION', 'check_retention(interval)',                             'nobody'),
        ('FUNCTION', 'check_snapshot(uuid, text[])',                          'nobody'),
        ('FUNCTION', 'check_token_fields(text[], text, text[], timestamptz, jsonb, cidr[], integer, interval)', 'nobody'),
        ('FUNCTION', 'check_user_named(text)',                                'nobody'),
        ('FUNCTION', 'check_users_condition(oid, text)',                      'nobody'),
        ('FUNCTION', 'check_users_key(oid, smallint)',                        'nobody'),
        ('FUNCTION', 'check_users_table(regclass)',                           'nobody'),
        ('FUNCTION', 'check_webhook_url(text)',                              'nobody'),
        ('FUNCTION', 'check_within_parent(tollgate.api_tokens, tollgate.api_tokens)', 'nobody'),
        ('FUNCTION', 'claim_token_slot(text)',                                'nobody'),
        ('FUNCTION', 'close_usage()',                                         'nobody'),
        ('FUNCTION', 'count_webhook_messages()',                             'nobody'),
        ('FUNCTION', 'continue_walk(text, text, interval, integer, interval)', 'nobody'),
        ('FUNCTION', 'current_epoch()',                                       'nobody'),
        ('FUNCTION', 'descendants(uuid)',                                     'nobody'),
        ('FUNCTION', 'digest_of(bytea[])',                                    'nobody'),
        ('FUNCTION', 'disable_tokens_of_users(text[], jsonb)',                'nobody'),
        ('FUNCTION', 'disable_webhook(text, text)',                           'nobody'),
        ('FUNCTION', 'drop_users_triggers(regclass)',                         'nobody'),
        ('FUNCTION', 'enable_tokens_of_users(text[], jsonb)',                 'nobody'),
        ('FUNCTION', 'end_batch(tollgate.event_cursor)',                      'nobody'),
        ('FUNCTION', 'epoch_identity(integer)',                               'nobody'),
        ('FUNCTION', 'epoch_lineage(integer)',                                'nobody'),
        ('FUNCTION', 'epoch_of_cursor(uuid)',                                 'nobody'),
        ('FUNCTION', 'fault_of_stretch(tollgate.audit_seals, tollgate.audit_place, boolean)', 'nobody'),
        ('FUNCTION', 'final_place()',                                         'nobody'),
        ('FUNCTION', 'first_pending(tollgate.event_cursor, integer)',         'nobody'),
        ('FUNCTION', 'finding_is_settled(uuid, timestamptz, bytea)',          'nobody'),
        ('FUNCTION', 'found()',                                               'nobody'),
        ('FUNCTION', 'free_finding(bigint)',                                  'nobody'),
        ('FUNCTION', 'free_usage(bigint)',                                    'nobody'),
        ('FUNCTION', 'forget_dropped_roles()',                                'nobody'),
        ('FUNCTION', 'give_capability(oid, text)',                            'nobody'),
        ('FUNCTION', 'handed_out_usage()',                                    'nobody'),
        ('FUNCTION', 'hash_of_seal(tollgate.audit_seals, bytea)',             'nobody'),
        ('FUNCTION', 'hide_bind_values(oid)',                                 'nobody'),
        ('FUNCTION', 'host_of_url(text)',                                    'nobody'),
        ('FUNCTION', 'give_digest(uuid, bytea)',                              'nobody'),
        ('FUNCTION', 'intersect_networks(cidr[], cidr[])',                    'nobody'),
        ('FUNCTION', 'intersect_scopes(text[], text[])',                      'nobody'),
        ('FUNCTION', 'is_logical_worker()',                                  'nobody'),
        ('FUNCTION', 'is_purging_audit_log()',                                'nobody'),
        ('FUNCTION', 'last_purged_seal()',                                    'nobody'),
        ('FUNCTION', 'leave_out()',                                          'nobody'),
        ('FUNCTION', 'leadership_of(text)',                                   'nobody'),
        ('FUNCTION', 'limit_within(integer, interval, integer, interval)',    'nobody'),
        ('FUNCTION', 'json_digest(jsonb)',                                    'nobody'),
        ('FUNCTION', 'json_text_size(jsonb, integer, integer)',               'nobody'),
        ('FUNCTION', 'lock_for_rotation(uuid)',                               'nobody'),
        ('FUNCTION', 'lock_leadership(text)',                                 'nobody'),
        ('FUNCTION', 'lock_managed_token(uuid, boolean)',                     'nobody'),
        ('FUNCTION', 'lock_seals(text)',                                      'nobody'),
        ('FUNCTION', 'lock_token(uuid, boolean)',                             'nobody'),
        ('FUNCTION', 'lock_token_slots(text)',                                'nobody'),
        ('FUNCTION', 'lock_tokens_of_users(text[])',                          'nobody'),
        ('FUNCTION', 'make_snapshot(xid8[], xid8)',                           'nobody'),
        ('FUNCTION', 'measure_stretch(tollgate.audit_place, tollgate.audit_place)', 'nobody'),
        ('FUNCTION', 'live_successors(uuid)',                                 'nobody'),
        ('FUNCTION', 'memory_stats()',                                        'nobody'),
        ('FUNCTION', 'narrow_descendants(tollgate.api_tokens, text)',         'nobody'),
        ('FUNCTION', 'network_contains(cidr, cidr)',                          'nobody'),
        ('FUNCTION', 'networks_contain(cidr[], cidr[])',                      'nobody'),
        ('FUNCTION', 'next_id(regclass)',                                    'nobody'),
        ('FUNCTION', 'new_webhook_secret()',                                  'nobody'),
        ('FUNCTION', 'no_such_webhook(text)',                                 'nobody'),
        ('FUNCTION', 'notify_family_event(text, uuid, text, text, bigint)',   'nobody'),
        ('FUNCTION', 'notify_of_users(bigint, bigint, text)',                 'nobody'),
        ('FUNCTION', 'notify_token_event(text, uuid, text, text, bigint)',    'nobody'),
        ('FUNCTION', 'place_after_seal(bigint)',                              'nobody'),
        ('FUNCTION', 'place_of_cursor(tollgate.event_cursor)',                'nobody'),
        ('FUNCTION', 'place_of_horizon(integer, xid8)',                       'nobody'),
        ('FUNCTION', 'place_received_event()',                               'nobody'),
        ('FUNCTION', 'presented_token_id(text, inet)',                        'nobody'),
        ('FUNCTION', 'purge_messages_after(boolean, interval, integer, timestamptz, bigint)', 'nobody'),
        ('FUNCTION', 'purge_is_proven(tollgate.audit_seals, bigint)',         'nobody'),
        ('FUNCTION', 'purge_sealed_events(timestamptz, integer)',             'nobody'),
        ('FUNCTION', 'query_as(oid, text, text[])',                           'nobody'),
        ('FUNCTION', 'ranges_of_batch(tollgate.event_cursor)',                'nobody'),
        ('FUNCTION', 'quote_redacted(text)',                                  'nobody'),
        ('FUNCTION', 'read_change(tollgate.api_tokens, text, jsonb)',         'nobody'),
        ('FUNCTION', 'readable_snapshot(integer)',                            'nobody'),
        ('FUNCTION', 'record_reuse(uuid, timestamptz, inet)',                 'nobody'),
        ('FUNCTION', 'refuse_audit_change()',                                 'nobody'),
        ('FUNCTION', 'refuse_token(uuid, text, text)',                        'nobody'),
        ('FUNCTION', 'renew_capability()',                                    'nobody'),
        ('FUNCTION', 'replace_webhook_backlog(tollgate.webhook_backlogs)',    'nobody'),
        ('FUNCTION', 'replace_token(uuid, uuid, bytea, text, interval, interval, timestamptz, boolean)', 'nobody'),
        ('FUNCTION', 'resolve_capability_role()',                             'nobody'),
        ('FUNCTION', 'revoke_departed_users()',                               'nobody'),
        ('FUNCTION', 'revoke_families(uuid[], text, jsonb)',                  'nobody'),
        ('FUNCTION', 'revoke_tokens_of_users(text[], text, jsonb)',           'nobody'),
        ('FUNCTION', 'revoke_without_notification(text[], text, jsonb)',      'nobody'),
        ('FUNCTION', 'scope_is_valid(text)',                                  'nobody'),
        ('FUNCTION', 'sequences_behind()',                                   'nobody'),
        ('FUNCTION', 'session_label(name, name, text)',                       'nobody'),
        ('FUNCTION', 'set_webhook_paused(text, boolean)',                    'nobody'),
        ('FUNCTION', 'settle_all_users(regclass, text[])',                    'nobody'),
        ('FUNCTION', 'settle_and_notify(oid, text[], text[], text)',          'nobody'),
        ('FUNCTION', 'settle_findings()',                                     'nobody'),
        ('FUNCTION', 'settle_privileges()',                                   'nobody'),
        ('FUNCTION', 'settle_user(text)',                                     'nobody'),
        ('FUNCTION', 'settle_users(regclass, text[], text[], text)',          'nobody'),
        ('FUNCTION', 'signature_of_finding(uuid, timestamptz, inet)',         'nobody'),
        ('FUNCTION', 'signature_of_usage(text, uuid, bigint, tollgate.usage_row[])', 'nobody'),
        ('FUNCTION', 'snapshot_contains(pg_snapshot, pg_snapshot)',           'nobody'),
        ('FUNCTION', 'states_of_users(regclass, text[], text[])',             'nobody'),
        ('FUNCTION', 'stored_reason(text)',                                   'nobody'),
        ('FUNCTION', 'system_identifier()',                                   'nobody'),
        ('FUNCTION', 'unite_snapshots(pg_snapshot, pg_snapshot)',             'nobody'),
        ('FUNCTION', 'issued_detail(tollgate.api_tokens)',                    'nobody'),
        ('FUNCTION', 'tokens_estimate()',                                     'nobody'),
        ('FUNCTION', 'token_changes(tollgate.api_tokens, tollgate.api_tokens)', 'nobody'),
        ('FUNCTION', 'token_is_within(tollgate.api_tokens, tollgate.api_tokens)', 'nobody'),
        ('FUNCTION', 'user_is_inactive(uuid)',                                'nobody'),
        ('FUNCTION', 'users_in_state(text[], text)',                          'nobody'),
        ('FUNCTION', 'users_key(oid, text[])',                                'nobody'),
        ('FUNCTION', 'users_row_changed()',                                   'nobody'),
        ('FUNCTION', 'users_table_faults()',                                  'nobody'),
        ('FUNCTION', 'users_table_arguments(oid)',                            'nobody'),
        ('FUNCTION', 'users_with_tokens(text[])',                             'nobody'),
        ('FUNCTION', 'wal_timeline()',                                        'nobody'),
        ('FUNCTION', 'webhook_backlog(text)',                                 'nobody'),
        ('FUNCTION', 'webhook_url(text)',                                     'nobody'),
        ('FUNCTION', 'without_token(text, text)',                             'nobody'),
        ('TYPE',     'audit_place',                                           'nobody'),
        ('TYPE',     'memory_stats',                                          'nobody'),
        ('VIEW',     'object_privileges',                                     'nobody'),
        ('VIEW',     'privilege_decisions',                                   'nobody')
    ) d (object_type, object, given_to);
COMMENT ON VIEW tollgate.privilege_decisions IS
    'The decision about each function, view and type of ours: given to everyone (public), to a capability, or to nobody. Internal: see capability_privileges';

CREATE VIEW tollgate.capability_privileges AS
    SELECT i.capability, d.object_type, d.object,
           CASE d.object_type WHEN 'FUNCTION' THEN 'EXECUTE' WHEN 'VIEW' THEN 'SELECT' WHEN 'TYPE' THEN 'USAGE' END AS privilege
    FROM tollgate.privilege_decisions d
    JOIN (VALUES ('verifier', 'verifier'),
                 ('issuer',   'issuer'), ('issuer', 'verifier'),
                 ('admin',    'admin'),  ('admin',  'issuer'), ('admin', 'verifier'),
                 ('operator', 'operator')) i (capability, includes) ON i.includes = d.given_to;
COMMENT ON VIEW tollgate.capability_privileges IS
    'What each capability gives: verifier verifies, authenticates, and revokes what it is shown; issuer also creates, derives, imports, lists, rotates, disables and revokes tokens; admin also changes tokens, manages scopes, capabilities and tables of users, checks and purges the audit log, and sees all tokens, counters and daemons; operator is what the daemon needs';

-- Names and signatures are read in the search path of these functions, whatever the caller's is.
CREATE FUNCTION tollgate.capability_objects(capability text) RETURNS TABLE (object_id oid, object_type text, object text, privilege text)
    LANGUAGE sql STABLE ROWS 30
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT p.object::regprocedure::oid, p.object_type, p.object::regprocedure::text, p.privilege
        FROM tollgate.capability_privileges p WHERE p.capability = $1 AND p.object_type = 'FUNCTION'
    UNION ALL
    SELECT p.object::regclass::oid, p.object_type, p.object::regclass::text, p.privilege
        FROM tollgate.capability_privileges p WHERE p.capability = $1 AND p.object_type = 'VIEW'
    UNION ALL
    SELECT p.object::regtype::oid, p.object_type, p.object::regtype::text, p.privilege
        FROM tollgate.capability_privileges p WHERE p.capability = $1 AND p.object_type = 'TYPE';
END;
COMMENT ON FUNCTION tollgate.capability_objects(text) IS 'The objects that a capability gives something on; raises if one of them does not exist. Internal.';

-- Privileges may come from a membership, or from PUBLIC. USAGE of a type is not needed to call a function. A part of a capability
-- is what no smaller one includes, and what is not given to operators and admins alike, as stats() is.
CREATE FUNCTION tollgate.list_own_capabilities() RETURNS TABLE (capability text, held text, missing text[])
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 4
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT o.capability,
           CASE WHEN bool_and(o.is_held) THEN 'whole' WHEN bool_or(o.is_held AND o.is_own) THEN 'partly' ELSE 'not' END,
           coalesce(array_agg(o.object ORDER BY o.object) FILTER (WHERE NOT o.is_held), '{}')
    FROM (
        SELECT k.place, k.capability, o.object,
               CASE k.capability WHEN 'operator' THEN count(*) OVER same = 1
                                 ELSE k.place = min(k.place) OVER same AND max(k.place) OVER same < 4 END AS is_own,
               CASE o.object_type WHEN 'FUNCTION' THEN has_function_privilege(a.role, o.object_id, o.privilege)
                                  ELSE has_table_privilege(a.role, o.object_id, o.privilege) END AS is_held
        FROM (SELECT tollgate.acting_role()::name) a (role),
             (VALUES (1, 'verifier'), (2, 'issuer'), (3, 'admin'), (4, 'operator')) k (place, capability),
             LATERAL tollgate.capability_objects(k.capability) o
        WHERE o.object_type <> 'TYPE'
        WINDOW same AS (PARTITION BY o.object_type, o.object_id)
    ) o
    GROUP BY o.place, o.capability ORDER BY o.place;
END;
COMMENT ON FUNCTION tollgate.list_own_capabilities() IS
    'What the calling role holds of each capability, itself or as a member of other roles: whole, partly, or not; and what it is missing of it';

CREATE VIEW tollgate.object_privileges AS
    SELECT o.object_type, o.object_id, o.object, o.owner, a.grantee, a.privilege_type AS privilege,
           -- By default privileges, which the role that made the object had set up.
           EXISTS (SELECT FROM pg_default_acl d, LATERAL aclexplode(d.defaclacl) g
                   WHERE d.defaclrole = o.owner AND d.defaclnamespace IN (0, 'tollgate'::regnamespace) AND d.defaclobjtype = o.default_type
                     AND g.grantee = a.grantee)
           -- Privileges that a script of the extension has touched are kept as the object's first ones.
           AND NOT EXISTS (SELECT FROM pg_init_privs i WHERE i.classoid = o.class_id AND i.objoid = o.object_id AND i.objsubid = 0) AS unasked
    FROM (
        SELECT 'FUNCTION', 'pg_proc'::regclass, p.oid, p.oid::regprocedure::text, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)), 'f'
            FROM pg_proc p WHERE p.pronamespace = 'tollgate'::regnamespace
        UNION ALL
        SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, 'pg_class'::regclass, c.oid, c.oid::regclass::text,
               c.relowner, c.relacl, CASE c.relkind WHEN 'S' THEN 'S' ELSE 'r' END
            FROM pg_class c WHERE c.relnamespace = 'tollgate'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'S')
        UNION ALL
        -- Of the types only those that are not the rows of a table or view.
        SELECT 'TYPE', 'pg_type'::regclass, t.oid, t.oid::regtype::text, t.typowner, coalesce(t.typacl, acldefault('T', t.typowner)), 'T'
            FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
            WHERE t.typnamespace = 'tollgate'::regnamespace AND t.typcategory <> 'A' AND coalesce(c.relkind, 'c') = 'c'
        UNION ALL
        SELECT 'SCHEMA', 'pg_namespace'::regclass, n.oid, quote_ident(n.nspname), n.nspowner, n.nspacl, 'n'
            FROM pg_namespace n WHERE n.nspname = 'tollgate'
    ) o (object_type, class_id, object_id, object, owner, acl, default_type), LATERAL aclexplode(o.acl) a;
COMMENT ON VIEW tollgate.object_privileges IS
    'The privileges on our objects as the catalogue has them, one row each; grantee 0 is PUBLIC. Internal: see capability_grants';
